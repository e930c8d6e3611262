//! Search for each planted fault: how many seeds does it take to find it?

use crate::explore::{Explored, Seeds, explore_with};
use pvio_ring::planted::{Fault, plant};
use std::fmt;

/// The result for one fault.
#[derive(Debug)]
pub struct Search {
    pub fault: Fault,
    pub explored: Explored,
}

impl Search {
    /// Runs seeds with the fault until one fails.
    #[must_use]
    pub fn of(fault: Fault, seeds: Seeds) -> Self {
        let explored = explore_with(seeds, || plant(Some(fault)));
        plant(None);
        Self { fault, explored }
    }

    /// Returns whether the fault was found.
    #[must_use]
    pub fn is_found(&self) -> bool {
        self.explored.failure.is_some()
    }
}

/// A row of a table in Markdown.
impl fmt::Display for Search {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, text) = (format!("{:?}", self.fault), self.fault.text());
        // Lines of a page have a limited width.
        let text = text.split(" (").next().unwrap_or(text);
        let runs = self.explored.runs;
        if self.is_found() {
            write!(f, "| `{name}` | {text} | {runs} |")
        } else {
            write!(f, "| `{name}` | {text} | not in {runs} |")
        }
    }
}
