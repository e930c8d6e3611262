//! Protocol between dom0 and a guest: lines on the guest's console. It works before any device
//! does, and is not a device under test.
//!
//! dom0 sends `PVIO-LAB N VERB JSON`; the guest replies with `PVIO-LAB N ok JSON` or `PVIO-LAB N no
//! TEXT`. All other lines on the console are from the kernel, and are logged.

use serde_json::Value;

/// Prefix of every line of the protocol.
pub const MARK: &str = "PVIO-LAB ";

/// Number of the reply that a guest sends without a request when its agent is ready.
pub const HELLO: u64 = 0;

/// A request of dom0.
#[derive(Debug, PartialEq)]
pub struct Request {
    /// Number of the request, which its reply repeats.
    pub number: u64,
    /// The operation.
    pub verb: String,
    /// Arguments, which depend on the verb.
    pub arguments: Value,
}

/// A guest's reply.
#[derive(Debug, PartialEq)]
pub struct Answer {
    /// Number of the request.
    pub number: u64,
    /// The result, or an error message.
    pub outcome: Result<Value, String>,
}

impl Request {
    /// Formats the line, without a line feed.
    pub fn line(&self) -> String {
        format!("{MARK}{} {} {}", self.number, self.verb, self.arguments)
    }

    /// Parses a line; text before the prefix is ignored.
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
    /// Formats the line, without a line feed.
    pub fn line(&self) -> String {
        match &self.outcome {
            Ok(value) => format!("{MARK}{} ok {value}", self.number),
            // As JSON, so that it is a single line.
            Err(text) => format!("{MARK}{} no {}", self.number, Value::from(text.as_str())),
        }
    }

    /// Parses a line; text before the prefix is ignored.
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
    fn link_lines_round_trip() {
        let request = Request { number: 7, verb: "verify".into(), arguments: json!({"a": "b c"}) };
        assert_eq!(Request::parse(&request.line()), Some(request));
        for outcome in [Ok(json!([1, "x y"])), Err("two\nlines".to_owned())] {
            let answer = Answer { number: 7, outcome };
            assert!(!answer.line().contains('\n'));
            assert_eq!(Answer::parse(&format!("[  1.0] {}\r", answer.line())), Some(answer));
        }
    }

    #[test]
    fn unrelated_console_line_is_ignored() {
        assert_eq!(Answer::parse("[    1.2] xen: up"), None);
        assert_eq!(Answer::parse("PVIO-LAB init 4.0 s"), None);
    }
}
