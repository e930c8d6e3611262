//! Reduction of a failed run to the choices that are necessary for its failure.

use crate::choices::{Segment, Tape};
use crate::seeds::{Failure, replay};
use crate::sim::Sim;

/// Number of lines of a reduced run's trace that are stored.
const LINES: usize = 10_000;

/// Removes steps of a failed run, and sets choices to 0, while it fails at the same place. At most
/// `budget` runs are made. Returns the failure of the reduced run, whose tape can be
/// [replayed](replay).
pub fn shrink<R>(
    seed: u64,
    failure: &Failure,
    budget: usize,
    run: impl FnMut(&mut Sim) -> R,
) -> Failure {
    let Some(tape) = failure.tape.clone() else { return failure.clone() };
    let mut search = Search { seed, place: kind(failure), budget, run, best: tape };
    search.remove_steps();
    search.zero_choices();
    search.remove_steps();
    let Search { best, mut run, .. } = search;
    match replay(seed, &best, LINES, &mut run) {
        Err(shrunk) => Failure { tape: Some(best), ..shrunk },
        Ok(_) => failure.clone(),
    }
}

/// What makes two failures the same one: the place, and the message without its numbers.
fn kind(failure: &Failure) -> String {
    let words = failure.what.chars().filter(|c| !c.is_ascii_digit()).take(40);
    failure.place.chars().chain(words).collect()
}

struct Search<F> {
    seed: u64,
    place: String,
    budget: usize,
    run: F,
    best: Tape,
}

impl<F> Search<F> {
    /// Keeps a candidate if it fails in the same way.
    fn keep<R>(&mut self, candidate: Tape) -> bool
    where
        F: FnMut(&mut Sim) -> R,
    {
        if self.budget == 0 {
            return false;
        }
        self.budget -= 1;
        let same = replay(self.seed, &candidate, 0, &mut self.run)
            .is_err_and(|failure| kind(&failure) == self.place);
        if same {
            self.best = candidate;
        }
        same
    }

    /// Removes ranges of steps, half of them first, down to single ones.
    fn remove_steps<R>(&mut self)
    where
        F: FnMut(&mut Sim) -> R,
    {
        let mut size = self.best.len() / 2;
        while size > 0 && self.budget > 0 {
            // From the end, since later steps rarely have an influence. The first segment is not a step.
            let mut end = self.best.len();
            while end > 1 && self.budget > 0 {
                let start = end.saturating_sub(size).max(1);
                let mut candidate = self.best.clone();
                candidate.drain(start..end);
                self.keep(candidate);
                end = start;
            }
            size /= 2;
        }
    }

    /// Sets the choices of whole steps to 0, then single ones.
    fn zero_choices<R>(&mut self)
    where
        F: FnMut(&mut Sim) -> R,
    {
        for at in 0..self.best.len() {
            // The first choice of a step selects its action.
            let first = usize::from(at > 0);
            if self.best[at].values.iter().skip(first).all(|value| *value == 0) {
                continue;
            }
            let mut candidate = self.best.clone();
            candidate[at].values.iter_mut().skip(first).for_each(|value| *value = 0);
            if self.keep(candidate) {
                continue;
            }
            for n in first..self.best[at].values.len() {
                let mut candidate = self.best.clone();
                if std::mem::take(&mut candidate[at].values[n]) != 0 {
                    self.keep(candidate);
                }
            }
        }
        self.best.iter_mut().for_each(Segment::trim);
    }
}
