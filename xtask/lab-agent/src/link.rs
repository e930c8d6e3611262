//! How dom0 and a guest talk: lines on the guest's console, which works before any device does and
//! is no device under test.
//!
//! dom0 sends `PVIO-LAB N VERB JSON`, the guest answers `PVIO-LAB N ok JSON` or `PVIO-LAB N no
//! TEXT`. Whatever else is on the console is the kernel's, and a log.

use serde_json::Value;

/// In front of every line that is ours.
pub const MARK: &str = "PVIO-LAB ";

/// What a guest says of its own accord once it listens; counts as answer 0.
pub const HELLO: u64 = 0;

/// What dom0 asks for.
#[derive(Debug, PartialEq)]
pub struct Request {
    /// Which answer belongs to it.
    pub number: u64,
    /// What to do.
    pub verb: String,
    /// Depends on the verb.
    pub arguments: Value,
}

/// What a guest says to it.
#[derive(Debug, PartialEq)]
pub struct Answer {
    /// The request's.
    pub number: u64,
    /// What came of it, or what went wrong.
    pub outcome: Result<Value, String>,
}

impl Request {
    /// As a line, without its end.
    pub fn line(&self) -> String {
        format!("{MARK}{} {} {}", self.number, self.verb, self.arguments)
    }

    /// From a line, whatever stands in front of the mark.
    pub fn parse(line: &str) -> Option<Self> {
        let (_, rest) = line.split_once(MARK)?;
        let mut words = rest.trim_end().splitn(3, ' ');
        let number = words.next()?.parse().ok()?;
        let verb = words.next()?.to_owned();
        let arguments = serde_json::from_str(words.next()?).ok()?;
        Some(Self { number, verb, arguments })
    }
}

impl Answer {
    /// As a line, without its end.
    pub fn line(&self) -> String {
        match &self.outcome {
            Ok(value) => format!("{MARK}{} ok {value}", self.number),
            // As JSON, so that it is one line whatever is in it.
            Err(text) => format!("{MARK}{} no {}", self.number, Value::from(text.as_str())),
        }
    }

    /// From a line, whatever stands in front of the mark.
    pub fn parse(line: &str) -> Option<Self> {
        let (_, rest) = line.split_once(MARK)?;
        let mut words = rest.trim_end().splitn(3, ' ');
        let number = words.next()?.parse().ok()?;
        let good = words.next()?;
        let value: Value = serde_json::from_str(words.next()?).ok()?;
        let outcome = match good {
            "ok" => Ok(value),
            "no" => Err(value.as_str()?.to_owned()),
            _ => return None,
        };
        Some(Self { number, outcome })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn lines_are_read_as_written() {
        let request = Request { number: 7, verb: "verify".into(), arguments: json!({"a": "b c"}) };
        assert_eq!(Request::parse(&request.line()), Some(request));
        for outcome in [Ok(json!([1, "x y"])), Err("two\nlines".to_owned())] {
            let answer = Answer { number: 7, outcome };
            assert!(!answer.line().contains('\n'));
            assert_eq!(Answer::parse(&format!("[  1.0] {}\r", answer.line())), Some(answer));
        }
    }

    #[test]
    fn other_lines_are_not_ours() {
        assert_eq!(Answer::parse("[    1.2] xen: up"), None);
        assert_eq!(Answer::parse("PVIO-LAB init 4.0 s"), None);
    }
}
