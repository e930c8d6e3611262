//! The system calls of each kind of process.
//!
//! [`table::CALLS`] has every call that a process needs after its start, and why. Everything else
//! kills the process. A few calls that the C library or the standard library try, and do without, are
//! denied with an error instead ([`table::DENIED`]).

mod install;
pub mod ioctls;
pub mod table;

use crate::applied::{Applied, Layer};
use crate::layers::ProcessKind;
use serde::{Deserialize, Serialize};

/// Number of a system call.
pub type Number = i64;

/// Condition on the arguments of a system call. Arguments count from 0 and have 32 bits unless noted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Arguments {
    /// Any arguments.
    Any,
    /// The argument is one of the values.
    OneOf(u8, &'static [u32]),
    /// The argument is none of the values.
    NoneOf(u8, &'static [u32]),
    /// The argument has none of the bits.
    Without(u8, u32),
    /// The argument has at least one of the bits.
    With(u8, u32),
    /// The argument, of 64 bits, is 0.
    Null(u8),
    /// The argument is the id of this process.
    OwnProcess(u8),
    /// Two arguments, each one of the values.
    Both((u8, &'static [u32]), (u8, &'static [u32])),
}

/// A system call that a process may make.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    /// Name of the call.
    pub name: &'static str,
    /// Its number on this architecture.
    pub number: Number,
    /// Condition on its arguments. Several entries of one call are alternatives.
    pub arguments: Arguments,
    /// The kinds of processes that need it.
    pub kinds: &'static [ProcessKind],
    /// What needs it.
    pub reason: &'static str,
}

/// What happens on a call that is not permitted.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Enforcement {
    /// The process is killed with SIGSYS.
    #[default]
    Kill,
    /// The call is executed, and logged by the kernel (audit log or `dmesg`). For diagnosis: nothing
    /// is enforced.
    Log,
}

/// The system calls of a process that has started.
#[derive(Clone, Debug)]
pub struct SystemCalls {
    kind: ProcessKind,
    calls: Vec<Call>,
}

impl SystemCalls {
    /// Returns the calls of a kind of process.
    #[must_use]
    pub fn of(kind: ProcessKind) -> Self {
        let all = table::CALLS.iter().chain(table::LEGACY);
        let calls = all.filter(|call| call.kinds.contains(&kind));
        Self { kind, calls: calls.copied().collect() }
    }

    /// Permits another call.
    #[must_use]
    pub fn and(mut self, call: Call) -> Self {
        self.calls.push(call);
        self
    }

    /// Returns the permitted calls.
    #[must_use]
    pub fn calls(&self) -> &[Call] {
        &self.calls
    }

    /// Installs the filter on all threads of the process, irreversibly, and records the outcome. It
    /// also sets `no_new_privs`.
    pub fn install(&self, enforcement: Enforcement, applied: &mut Applied) {
        applied.record(Layer::SystemCalls, install::install(self, enforcement));
    }
}
