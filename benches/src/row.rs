//! The result of a measurement.

use serde::Serialize;

/// The result of a case: pvio compared with the reference.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Row {
    /// The suite: `ring`, `disk` or `net`.
    pub suite: String,
    /// The case within it.
    pub case: String,
    /// Median of pvio, in `unit`; more is better.
    pub ours: f64,
    /// The reference's median, in `unit`.
    pub reference: f64,
    /// Name of the reference.
    pub reference_name: String,
    /// Unit of both figures.
    pub unit: String,
    /// Median of the ratios pvio ÷ reference of pairs measured immediately after each other.
    pub ratio: f64,
    /// The smallest of these ratios.
    pub ratio_min: f64,
    /// The largest of these ratios.
    pub ratio_max: f64,
    /// Number of pairs.
    pub runs: usize,
    /// Processor time, where it is measured.
    #[serde(flatten)]
    pub cpu: Option<Cpu>,
}

/// Processor time per packet in nanoseconds: medians of the runs. Includes polling, and the
/// kernel's work in the context of the threads.
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
pub struct Cpu {
    /// Frontend and backend together.
    pub ours_cpu: f64,
    /// The backend's worker.
    pub worker_cpu: f64,
    /// The reference.
    pub reference_cpu: f64,
}

/// Returns the row of pairs `(ours, reference)` that were measured alternately.
///
/// # Panics
/// There is no pair.
#[must_use]
pub fn paired(
    suite: &str,
    case: &str,
    reference_name: &str,
    unit: &str,
    pairs: &[(f64, f64)],
) -> Row {
    let ratios = sorted(pairs.iter().map(|(ours, reference)| ours / reference));
    Row {
        suite: suite.into(),
        case: case.into(),
        ours: median(&sorted(pairs.iter().map(|p| p.0))),
        reference: median(&sorted(pairs.iter().map(|p| p.1))),
        reference_name: reference_name.into(),
        unit: unit.into(),
        ratio: median(&ratios),
        ratio_min: ratios[0],
        ratio_max: ratios[ratios.len() - 1],
        runs: pairs.len(),
        cpu: None,
    }
}

impl Cpu {
    /// Returns the medians of tuples that were measured alternately: pvio, its worker, and the
    /// reference.
    ///
    /// # Panics
    /// There is no tuple.
    #[must_use]
    pub fn of(pairs: &[[f64; 3]]) -> Self {
        let [ours_cpu, worker_cpu, reference_cpu] =
            [0, 1, 2].map(|which| median(&sorted(pairs.iter().map(|pair| pair[which]))));
        Self { ours_cpu, worker_cpu, reference_cpu }
    }
}

fn sorted(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values
}

fn median(sorted: &[f64]) -> f64 {
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 { sorted[middle] } else { (sorted[middle - 1] + sorted[middle]) / 2.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn row_ratio_is_median_of_pairs() {
        let row = paired("s", "c", "r", "u", &[(1.0, 2.0), (30.0, 10.0), (4.0, 4.0)]);
        assert_eq!((row.ratio, row.ratio_min, row.ratio_max, row.runs), (1.0, 0.5, 3.0, 3));
        assert_eq!((row.ours, row.reference), (4.0, 4.0));
        assert_eq!(paired("s", "c", "r", "u", &[(1.0, 1.0), (2.0, 1.0)]).ratio, 1.5);
    }

    #[test]
    fn row_has_cpu_time_only_if_measured() {
        let cpu = Cpu::of(&[[5.0, 1.0, 3.0], [4.0, 2.0, 9.0], [6.0, 3.0, 1.0]]);
        let without = paired("s", "c", "r", "u", &[(1.0, 2.0)]);
        let with = Row { cpu: Some(cpu), ..without.clone() };
        let fields = [without, with].map(|row| serde_json::to_value(row).expect("a row"));
        for (name, value) in [("ours_cpu", 5.0), ("worker_cpu", 2.0), ("reference_cpu", 3.0)] {
            assert_eq!(fields[0].get(name), None, "{name}");
            assert_eq!(fields[1].get(name), Some(&value.into()), "{name}");
        }
    }
}
