//! What a measurement says.

use serde::Serialize;

/// One case, ours against the reference.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Row {
    /// What was measured: `ring`, `disk` or `net`.
    pub suite: String,
    /// The case within it.
    pub case: String,
    /// Our median, in `unit`; more is better.
    pub ours: f64,
    /// The reference's median, in `unit`.
    pub reference: f64,
    /// What the reference is.
    pub reference_name: String,
    /// Of both figures.
    pub unit: String,
    /// Median of the ratios ours ÷ reference of the pairs measured one right after the other.
    pub ratio: f64,
    /// The smallest of these ratios.
    pub ratio_min: f64,
    /// The largest of these ratios.
    pub ratio_max: f64,
    /// How many pairs.
    pub runs: usize,
}

/// The row of pairs `(ours, reference)` that were measured by turns.
///
/// # Panics
/// Without a pair.
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
    fn the_ratio_is_the_median_of_the_pairs() {
        let row = paired("s", "c", "r", "u", &[(1.0, 2.0), (30.0, 10.0), (4.0, 4.0)]);
        assert_eq!((row.ratio, row.ratio_min, row.ratio_max, row.runs), (1.0, 0.5, 3.0, 3));
        assert_eq!((row.ours, row.reference), (4.0, 4.0));
        assert_eq!(paired("s", "c", "r", "u", &[(1.0, 1.0), (2.0, 1.0)]).ratio, 1.5);
    }
}
