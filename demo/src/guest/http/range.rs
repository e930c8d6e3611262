//! Conditional and range requests (RFC 9110, 13 and 14).

use std::time::{Duration, SystemTime};

/// The header values as received.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Conditions {
    /// `Range`.
    pub range: Option<String>,
    /// `If-Range`.
    pub if_range: Option<String>,
    /// `If-Match`.
    pub if_match: Option<String>,
    /// `If-Unmodified-Since`.
    pub if_unmodified_since: Option<String>,
    /// `If-None-Match`.
    pub if_none_match: Option<String>,
    /// `If-Modified-Since`.
    pub if_modified_since: Option<String>,
}

/// The outcome: which part of the file to send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Selection {
    /// The whole file.
    Whole,
    /// From the first offset up to, not including, the second.
    Part(u64, u64),
    /// None: the client's copy is current (304).
    NotModified,
    /// The range is outside of the file (416).
    Unsatisfiable,
    /// None: a precondition failed (412).
    Failed,
}

impl Conditions {
    /// Evaluates the conditions for a file of `len` bytes with this `etag`, modified at `modified`
    /// seconds after 1970, in the order of RFC 9110, 13.2.2. `ranges` is whether the method
    /// supports ranges, which only GET does. An invalid range, or several, are ignored, as the RFC
    /// permits.
    #[must_use]
    pub fn select(&self, len: u64, etag: &str, modified: Option<u64>, ranges: bool) -> Selection {
        let date = |text: &str| httpdate::parse_http_date(text).ok();
        let changed = modified.map(at);
        if let Some(tags) = &self.if_match {
            // Strong comparison: a weak tag (`W/`) never equals the file's tag.
            if !entity_tags(tags).any(|tag| tag == "*" || tag == etag) {
                return Selection::Failed;
            }
        } else if let (Some(since), Some(changed)) =
            (self.if_unmodified_since.as_deref().and_then(date), changed)
            && changed > since
        {
            return Selection::Failed;
        }
        if let Some(tags) = &self.if_none_match {
            let matches = |tag: &str| tag == "*" || tag.trim_start_matches("W/") == etag;
            if entity_tags(tags).any(matches) {
                return Selection::NotModified;
            }
        } else if let (Some(since), Some(changed)) =
            (self.if_modified_since.as_deref().and_then(date), changed)
            && changed <= since
        {
            return Selection::NotModified;
        }
        let Some(range) = self.range.as_ref().filter(|_| ranges) else { return Selection::Whole };
        let same = |mark: &str| mark == etag || changed.is_some_and(|c| date(mark) == Some(c));
        if self.if_range.as_deref().is_some_and(|mark| !same(mark)) {
            return Selection::Whole;
        }
        parse(range, len).unwrap_or(Selection::Whole)
    }
}

/// Returns the tags of a list. The server's own tags contain no comma, so a split tag does not
/// match.
fn entity_tags(list: &str) -> impl Iterator<Item = &str> {
    list.split(',').map(str::trim)
}

/// Returns the time for `httpdate`, which supports years up to 9999.
#[must_use]
pub fn at(seconds: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(seconds.min(253_402_300_799))
}

fn parse(range: &str, len: u64) -> Option<Selection> {
    let (first, last) = range.strip_prefix("bytes=")?.trim().split_once('-')?;
    let number = |text: &str| {
        let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        // A number that overflows is beyond the end of any file.
        digits.then(|| text.parse().unwrap_or(u64::MAX))
    };
    let (first, end) = if first.is_empty() {
        let tail = number(last)?;
        if tail == 0 { (len, len) } else { (len.saturating_sub(tail), len) }
    } else if last.is_empty() {
        (number(first)?, len)
    } else {
        let (first, last) = (number(first)?, number(last)?);
        if last < first {
            return None;
        }
        (first, last.saturating_add(1).min(len))
    };
    Some(if first < end { Selection::Part(first, end) } else { Selection::Unsatisfiable })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(text: &str, len: u64) -> Selection {
        let conditions = Conditions { range: Some(text.into()), ..Conditions::default() };
        conditions.select(len, "\"e\"", Some(1_700_000_000), true)
    }

    #[test]
    fn range_header_selects_part_or_whole() {
        assert_eq!(range("bytes=0-0", 10), Selection::Part(0, 1));
        assert_eq!(range("bytes=5-", 10), Selection::Part(5, 10));
        assert_eq!(range("bytes=-3", 10), Selection::Part(7, 10));
        assert_eq!(range("bytes=-30", 10), Selection::Part(0, 10));
        assert_eq!(range("bytes=2-99999999999999999999999", 10), Selection::Part(2, 10));
        for outside in ["bytes=10-", "bytes=10-20", "bytes=-0", "bytes=99999999999999999999-"] {
            assert_eq!(range(outside, 10), Selection::Unsatisfiable, "{outside}");
        }
        assert_eq!(range("bytes=0-", 0), Selection::Unsatisfiable);
        for ignored in
            ["bytes=3-2", "bytes=a-b", "lines=0-1", "bytes=0-1,4-5", "bytes=-", "bytes=+1-2"]
        {
            assert_eq!(range(ignored, 10), Selection::Whole, "{ignored}");
        }
    }

    #[test]
    fn conditional_headers_are_evaluated_in_order() {
        let with = |f: &dyn Fn(&mut Conditions)| {
            let mut conditions =
                Conditions { range: Some("bytes=1-2".into()), ..Conditions::default() };
            f(&mut conditions);
            conditions.select(10, "\"e\"", Some(1_700_000_000), true)
        };
        let date = "Tue, 14 Nov 2023 22:13:20 GMT";
        assert_eq!(
            with(&|c| c.if_none_match = Some("\"a\", W/\"e\"".into())),
            Selection::NotModified
        );
        assert_eq!(with(&|c| c.if_none_match = Some("\"a\"".into())), Selection::Part(1, 3));
        assert_eq!(with(&|c| c.if_modified_since = Some(date.into())), Selection::NotModified);
        assert_eq!(
            with(&|c| c.if_modified_since = Some("yesterday".into())),
            Selection::Part(1, 3)
        );
        assert_eq!(with(&|c| c.if_range = Some("\"e\"".into())), Selection::Part(1, 3));
        assert_eq!(with(&|c| c.if_range = Some("\"old\"".into())), Selection::Whole);
        assert_eq!(with(&|c| c.if_range = Some(date.into())), Selection::Part(1, 3));
        assert_eq!(with(&|c| c.if_range = Some("W/\"e\"".into())), Selection::Whole);
        assert_eq!(with(&|c| c.if_match = Some("\"a\", \"e\"".into())), Selection::Part(1, 3));
        assert_eq!(with(&|c| c.if_match = Some("*".into())), Selection::Part(1, 3));
        assert_eq!(with(&|c| c.if_match = Some("W/\"e\"".into())), Selection::Failed);
        let before = "Tue, 14 Nov 2023 22:13:19 GMT";
        assert_eq!(with(&|c| c.if_unmodified_since = Some(before.into())), Selection::Failed);
        assert_eq!(with(&|c| c.if_unmodified_since = Some(date.into())), Selection::Part(1, 3));
        let both = |c: &mut Conditions| {
            c.if_match = Some("\"e\"".into());
            c.if_unmodified_since = Some(before.into());
        };
        assert_eq!(with(&both), Selection::Part(1, 3), "If-Match takes precedence");
    }

    #[test]
    fn range_header_is_ignored_unless_method_is_get() {
        let conditions = Conditions { range: Some("bytes=1-2".into()), ..Conditions::default() };
        assert_eq!(conditions.select(10, "\"e\"", None, false), Selection::Whole);
    }
}
