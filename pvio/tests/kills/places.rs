//! The source functions of instructions, from the debug information of the program.

use addr2line::Context;
use addr2line::gimli::{Dwarf, EndianSlice, LittleEndian};
use object::{Object, ObjectSection};
use std::collections::HashMap;
use std::fs;

type Reader = EndianSlice<'static, LittleEndian>;

/// The functions that carry out one step of the protocol, by their files and names. The name of one
/// that is not inlined is its symbol.
const STEPS: [(&str, &str, Step); 3] = [
    ("ring/src/inflight/requests.rs", "complete", Step::Complete),
    ("ring/src/inflight/requests.rs", "publish", Step::Publish),
    ("platforms/hosted/src/events.rs", "notify", Step::Notify),
];

/// A step of the protocol between a completion and the frontend's event.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Step {
    Complete,
    Publish,
    Notify,
}

/// The steps that instructions belong to.
pub struct Places {
    context: Context<Reader>,
    known: HashMap<u64, Option<Step>>,
}

impl Places {
    /// Reads the debug information of a program.
    pub fn of(program: &str) -> Self {
        // Used until the test program ends.
        let bytes: &'static [u8] = fs::read(program).unwrap().leak();
        let file = object::File::parse(bytes).unwrap();
        let section = |id: addr2line::gimli::SectionId| -> Result<Reader, object::Error> {
            let data = file.section_by_name(id.name()).map_or(Ok(&[][..]), |s| s.data())?;
            Ok(EndianSlice::new(data, LittleEndian))
        };
        let dwarf = Dwarf::load(section).unwrap();
        Self { context: Context::from_dwarf(dwarf).unwrap(), known: HashMap::new() }
    }

    /// Returns the step to which the instruction at an address of the program belongs, inlined
    /// functions included.
    pub fn step(&mut self, address: u64) -> Option<Step> {
        let context = &self.context;
        *self.known.entry(address).or_insert_with(|| {
            let mut frames = context.find_frames(address).skip_all_loads().ok()?;
            while let Ok(Some(frame)) = frames.next() {
                let (Some(function), Some(location)) = (frame.function, frame.location) else {
                    continue;
                };
                let name = function.raw_name().ok()?;
                let file = location.file.unwrap_or_default();
                let of = |(within, own, _): &&(&str, &str, Step)| {
                    let symbol = format!("{}{own}17h", own.len());
                    let is_own = name.split('<').next() == Some(own) || name.contains(&symbol);
                    file.ends_with(within) && is_own
                };
                if let Some((.., step)) = STEPS.iter().find(of) {
                    return Some(*step);
                }
            }
            None
        })
    }
}
