//! A directory as an HTML page.

use crate::guest::fs::{Entry, Kind};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_encode};
use pvio_daemon::units::human;
use std::fmt::Write as _;

/// Characters that need no escape in a path segment (RFC 3986, `pchar`), except those special in
/// HTML.
const SEGMENT: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~');

/// Encodes a name as a path segment of a URL.
#[must_use]
pub fn encode(name: &[u8]) -> String {
    percent_encode(name, SEGMENT).to_string()
}

/// Encodes a path for a URL.
#[must_use]
pub fn encode_path(path: &[u8]) -> String {
    path.split(|b| *b == b'/').map(encode).collect::<Vec<_>>().join("/")
}

/// Escapes text for HTML, also within quotes; control characters become visible.
#[must_use]
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            // Also characters that change the text direction of the rest of the line.
            c if c.is_control()
                || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}') =>
            {
                out.push('\u{fffd}');
            }
            c => out.push(c),
        }
    }
    out
}

/// Returns the page of the directory at `path`, which ends with a slash.
#[must_use]
pub fn page(path: &[u8], entries: &[Entry], left_out: usize) -> Vec<u8> {
    let title = escape(&String::from_utf8_lossy(path));
    let mut out = format!(
        "<!doctype html>\n<html lang=\"en\"><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\
         <title>{title}</title><style>{}</style><main><h1>{}</h1>",
        include_str!("listing.css"),
        crumbs(path)
    );
    out.push_str(&table(entries, left_out, true));
    out.push_str("</main></html>\n");
    out.into_bytes()
}

/// Returns the path with a link for each component.
fn crumbs(path: &[u8]) -> String {
    let mut out = String::from("<a href=\"/\">disk</a>");
    let mut link = String::from("/");
    for name in path.split(|b| *b == b'/').filter(|n| !n.is_empty()) {
        let _ = write!(link, "{}/", encode(name));
        let _ = write!(out, " / <a href=\"{link}\">{}</a>", escape(&String::from_utf8_lossy(name)));
    }
    out
}

/// Returns the entries as a table; with `up`, with a link to the parent directory.
#[must_use]
pub fn table(entries: &[Entry], left_out: usize, up: bool) -> String {
    let mut out = String::from(
        "<table class=\"files\"><thead><tr><th>name<th class=\"n\">size<th>changed</thead><tbody>",
    );
    if up {
        out.push_str("<tr class=\"dir\"><td><a href=\"../\">..</a><td><td>");
    }
    for Entry { name, kind, meta } in entries {
        let text = escape(&String::from_utf8_lossy(name));
        let link = encode(name);
        let changed = match meta.modified.and_then(|m| u64::try_from(m).ok()) {
            Some(at) => day(at),
            None => String::new(),
        };
        let _ = match kind {
            Kind::Dir => write!(
                out,
                "<tr class=\"dir\"><td><a href=\"{link}/\">{text}/</a><td><td>{changed}"
            ),
            Kind::File => write!(
                out,
                "<tr><td><a href=\"{link}\">{text}</a><td class=\"n\" title=\"{} bytes\">{}<td>{changed}",
                meta.len,
                human(meta.len)
            ),
            Kind::Link => write!(
                out,
                "<tr class=\"link\"><td><a href=\"{link}\">{text}</a> &#8599;<td><td>{changed}"
            ),
            Kind::Special => {
                write!(out, "<tr class=\"off\"><td>{text}<td class=\"n\">special<td>{changed}")
            }
        };
    }
    if entries.is_empty() {
        out.push_str("<tr class=\"off\"><td>nothing here<td><td>");
    }
    out.push_str("</tbody></table>");
    if left_out > 0 {
        let _ = write!(out, "<p class=\"off\">and {left_out} more, not listed</p>");
    }
    out
}

/// Formats a time as `2026-01-01 12:00`, UTC.
fn day(seconds: u64) -> String {
    // `httpdate` is the only date library among the dependencies. It formats "Thu, 01 Jan 2026
    // 12:00:00 GMT".
    let text = httpdate::fmt_http_date(super::range::at(seconds));
    let mut parts = text.split(' ').skip(1);
    let (day, month, year) = (parts.next(), parts.next(), parts.next());
    let clock = parts.next().and_then(|c| c.get(..5));
    match (day, month, year, clock) {
        (Some(day), Some(month), Some(year), Some(clock)) => {
            format!("{day} {month} {year} {clock}")
        }
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::fs::Meta;

    #[test]
    fn listing_escapes_names_in_html_and_links() {
        let name = b"\"><script>alert(1)</script>\x1b[31m&'/..\xff".to_vec();
        let entry = Entry { name, kind: Kind::File, meta: Meta { len: 1, modified: Some(-5) } };
        let page = String::from_utf8(page(b"/a<b/", &[entry], 3)).unwrap();
        assert!(!page.contains("<script>") && !page.contains('\x1b') && !page.contains("a<b"));
        assert!(page.contains("href=\"%22%3E%3Cscript%3E"), "{page}");
        assert!(page.contains("%2F..%FF\""), "{page}");
        assert!(page.contains("and 3 more"));
    }

    #[test]
    fn listing_formats_dates() {
        assert_eq!(day(1_767_268_800), "01 Jan 2026 12:00");
        assert_eq!(day(u64::MAX), "31 Dec 9999 23:59");
    }
}
