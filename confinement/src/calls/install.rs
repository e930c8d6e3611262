//! The filter of a list of system calls.

use super::table::{DENIED, Denied, LEGACY_DENIED};
use super::{Arguments, Enforcement, Number, SystemCalls};
use crate::applied::{Missing, Outcome, Reason};
use seccompiler::{
    BackendError, BpfProgram, Error, SeccompAction, SeccompCmpArgLen, SeccompCmpOp,
    SeccompCondition, SeccompFilter, SeccompRule, apply_filter_all_threads,
};
use std::collections::BTreeMap;

type Rules = BTreeMap<Number, Vec<SeccompRule>>;

/// Installs two filters, of which the kernel obeys the stricter one for each call: the first kills on
/// every call that is neither permitted nor denied, the second denies with an error.
pub fn install(calls: &SystemCalls, enforcement: Enforcement) -> Outcome {
    let (programs, permitted) = match programs(calls, enforcement) {
        Ok(programs) => programs,
        Err(error) => {
            let detail = format!("compile the filter: {error}");
            return Outcome::Missing(Missing { reason: Reason::Failed, detail });
        }
    };
    // The strict filter is the last one, since it kills on the call that installs a filter.
    for program in &programs {
        match apply_filter_all_threads(program) {
            Ok(()) => {}
            Err(Error::Seccomp(error) | Error::Prctl(error)) => {
                return Outcome::missing("seccomp", &error);
            }
            Err(error) => {
                let detail = format!("seccomp: {error}");
                return Outcome::Missing(Missing { reason: Reason::Failed, detail });
            }
        }
    }
    let kind = calls.kind.name();
    Outcome::Applied(match enforcement {
        Enforcement::Kill => format!("{kind}: {permitted} calls"),
        Enforcement::Log => format!("{kind}: {permitted} calls, others are logged only"),
    })
}

/// Returns the programs, and the number of permitted calls.
fn programs(
    calls: &SystemCalls,
    enforcement: Enforcement,
) -> Result<([BpfProgram; 2], usize), BackendError> {
    let arch = std::env::consts::ARCH.try_into()?;
    let mut denied = Rules::new();
    let mut permitted = Rules::new();
    for call in &calls.calls {
        add(&mut permitted, call.number, call.arguments)?;
    }
    let count = permitted.len();
    for &Denied { number, unless, .. } in DENIED.iter().chain(LEGACY_DENIED) {
        // Permitted to this kind of process, whatever the arguments are.
        if permitted.get(&number).is_some_and(Vec::is_empty) {
            continue;
        }
        add(&mut denied, number, unless.map_or(Arguments::Any, opposite))?;
        permitted.insert(number, Vec::new());
    }
    let strict = match enforcement {
        Enforcement::Kill => SeccompAction::KillProcess,
        Enforcement::Log => SeccompAction::Log,
    };
    let deny = match enforcement {
        Enforcement::Kill => SeccompAction::Errno(libc::EACCES.unsigned_abs()),
        Enforcement::Log => SeccompAction::Log,
    };
    let permitted = SeccompFilter::new(permitted, strict, SeccompAction::Allow, arch)?;
    let denied = SeccompFilter::new(denied, SeccompAction::Allow, deny, arch)?;
    Ok(([denied.try_into()?, permitted.try_into()?], count))
}

/// Adds a call. One with an empty list of rules matches whatever its arguments are.
fn add(rules: &mut Rules, number: Number, arguments: Arguments) -> Result<(), BackendError> {
    let conditions = conditions(arguments)?;
    let is_any = rules.get(&number).is_some_and(Vec::is_empty);
    let of_call = rules.entry(number).or_default();
    if conditions.is_empty() {
        of_call.clear();
    } else if !is_any {
        for all in conditions {
            of_call.push(SeccompRule::new(all)?);
        }
    }
    Ok(())
}

/// Returns alternatives, each of which is a list of conditions that all hold.
fn conditions(arguments: Arguments) -> Result<Vec<Vec<SeccompCondition>>, BackendError> {
    let dword = |index, op, value: u32| {
        SeccompCondition::new(index, SeccompCmpArgLen::Dword, op, value.into())
    };
    Ok(match arguments {
        Arguments::Any => Vec::new(),
        Arguments::OneOf(index, values) => {
            let each = values.iter().map(|value| dword(index, SeccompCmpOp::Eq, *value));
            each.map(|condition| condition.map(|c| vec![c])).collect::<Result<_, _>>()?
        }
        Arguments::NoneOf(index, values) => {
            let each = values.iter().map(|value| dword(index, SeccompCmpOp::Ne, *value));
            vec![each.collect::<Result<_, _>>()?]
        }
        Arguments::Without(index, bits) => {
            vec![vec![dword(index, SeccompCmpOp::MaskedEq(bits.into()), 0)?]]
        }
        Arguments::With(index, bits) => {
            let each = (0..u32::BITS).map(|bit| 1 << bit).filter(|bit| bits & bit != 0);
            let each = each.map(|bit| dword(index, SeccompCmpOp::MaskedEq(bit.into()), bit));
            each.map(|condition| condition.map(|c| vec![c])).collect::<Result<_, _>>()?
        }
        Arguments::Null(index) => {
            let op = SeccompCmpOp::Eq;
            vec![vec![SeccompCondition::new(index, SeccompCmpArgLen::Qword, op, 0)?]]
        }
        Arguments::OwnProcess(index) => {
            vec![vec![dword(index, SeccompCmpOp::Eq, std::process::id())?]]
        }
        Arguments::Both((first, firsts), (second, seconds)) => {
            let mut all = Vec::new();
            for a in firsts {
                for b in seconds {
                    let op = || SeccompCmpOp::Eq;
                    all.push(vec![dword(first, op(), *a)?, dword(second, op(), *b)?]);
                }
            }
            all
        }
    })
}

/// Returns the opposite of a condition; [`DENIED`] has no others.
fn opposite(arguments: Arguments) -> Arguments {
    match arguments {
        Arguments::With(index, bits) => Arguments::Without(index, bits),
        Arguments::Without(index, bits) => Arguments::With(index, bits),
        Arguments::OneOf(index, values) => Arguments::NoneOf(index, values),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layers::ProcessKind;

    #[test]
    fn filter_of_each_kind_compiles() {
        for kind in ProcessKind::ALL {
            for enforcement in [Enforcement::Kill, Enforcement::Log] {
                let calls = SystemCalls::of(kind);
                let ([denied, permitted], count) = programs(&calls, enforcement).unwrap();
                assert!(!denied.is_empty() && permitted.len() > count, "{kind:?}");
            }
        }
    }

    #[test]
    fn condition_on_bits_becomes_one_alternative_for_each_bit() {
        assert_eq!(conditions(Arguments::With(1, 0b101)).unwrap().len(), 2);
        assert_eq!(conditions(Arguments::Without(1, 0b101)).unwrap().len(), 1);
        assert_eq!(conditions(Arguments::OneOf(1, &[5, 6, 7])).unwrap().len(), 3);
        assert_eq!(conditions(Arguments::Both((0, &[1]), (1, &[2, 3]))).unwrap().len(), 2);
        assert!(conditions(Arguments::Any).unwrap().is_empty());
    }

    #[test]
    fn call_permitted_with_any_arguments_stays_so() {
        let mut rules = Rules::new();
        add(&mut rules, 1, Arguments::Any).unwrap();
        add(&mut rules, 1, Arguments::OneOf(0, &[1])).unwrap();
        add(&mut rules, 2, Arguments::OneOf(0, &[1])).unwrap();
        add(&mut rules, 2, Arguments::Any).unwrap();
        assert!(rules.values().all(Vec::is_empty));
    }

    #[test]
    fn condition_of_each_denied_call_has_an_opposite() {
        for Denied { name, unless, .. } in DENIED.iter().chain(LEGACY_DENIED) {
            assert!(unless.is_none_or(|unless| opposite(unless) != unless), "{name}");
        }
    }

    #[test]
    fn call_permitted_to_the_helper_is_not_denied_to_it() {
        let denied = |kind| programs(&SystemCalls::of(kind), Enforcement::Kill).unwrap().0[0].len();
        assert!(denied(ProcessKind::ImageHelper) < denied(ProcessKind::Disk));
    }
}
