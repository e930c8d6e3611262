//! Parser of requests; a rejection has a status.

use super::range::Conditions;
use super::{MAX_HEAD, MAX_HEADERS};
use percent_encoding::percent_decode;

/// Maximum length of the request target in bytes.
const MAX_TARGET: usize = 4096;

/// A parsed request.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Request {
    /// HEAD: only the head of the response is sent.
    pub head_only: bool,
    /// The path, percent-decoded, with a leading `/`, and with `.` and `..` resolved.
    pub path: Vec<u8>,
    /// The part after `?`, as received.
    pub query: String,
    /// The client requests that the connection is kept alive.
    pub keep_alive: bool,
    /// Conditional and range headers.
    pub conditions: Conditions,
}

/// Why a request is rejected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// The status code.
    pub status: u16,
    /// One line for the client.
    pub why: &'static str,
}

/// Returns a rejection as an error.
const fn refuse<T>(status: u16, why: &'static str) -> Result<T, Refusal> {
    Err(Refusal { status, why })
}

/// Parses the head at the start of `bytes`. Returns the request and the head's length, or `None` if
/// the head is incomplete.
///
/// # Errors
/// A [`Refusal`], after which the connection must be closed.
pub fn parse(bytes: &[u8]) -> Result<Option<(Request, usize)>, Refusal> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut parsed = httparse::Request::new(&mut headers);
    let len = match parsed.parse(bytes) {
        Ok(httparse::Status::Complete(len)) if len <= MAX_HEAD => len,
        Ok(httparse::Status::Partial) if bytes.len() < MAX_HEAD => return Ok(None),
        Ok(_) => return refuse(431, "the request's head is longer than 16 KiB"),
        Err(httparse::Error::TooManyHeaders) => {
            return refuse(431, "the request has more than 64 headers");
        }
        Err(httparse::Error::Version) => {
            return refuse(505, "only HTTP/1.0 and HTTP/1.1 are spoken here");
        }
        Err(_) => return refuse(400, "this is no HTTP request"),
    };
    let is_1_1 = parsed.version == Some(1);
    let mut request = Request { keep_alive: is_1_1, ..Request::default() };
    let mut hosts = 0;
    for header in parsed.headers.iter() {
        let name = header.name.to_ascii_lowercase();
        // The headers that are evaluated only have ASCII values.
        let Ok(value) = std::str::from_utf8(header.value).map(str::trim) else { continue };
        match name.as_str() {
            "host" => hosts += 1,
            "connection" => {
                for token in value.split(',').map(str::trim) {
                    if token.eq_ignore_ascii_case("close") {
                        request.keep_alive = false;
                    } else if token.eq_ignore_ascii_case("keep-alive") {
                        request.keep_alive = true;
                    }
                }
            }
            "content-length" if value != "0" => {
                return refuse(413, "a request here has no body");
            }
            "transfer-encoding" => return refuse(413, "a request here has no body"),
            "range" => request.conditions.range = Some(value.to_owned()),
            "if-range" => request.conditions.if_range = Some(value.to_owned()),
            "if-match" => add(&mut request.conditions.if_match, value),
            "if-none-match" => add(&mut request.conditions.if_none_match, value),
            "if-unmodified-since" => {
                request.conditions.if_unmodified_since = Some(value.to_owned());
            }
            "if-modified-since" => request.conditions.if_modified_since = Some(value.to_owned()),
            _ => {}
        }
    }
    match parsed.method {
        Some("GET") => {}
        Some("HEAD") => request.head_only = true,
        _ => return refuse(405, "the disk is only read here: use GET or HEAD"),
    }
    if hosts > 1 || (is_1_1 && hosts == 0) {
        return refuse(400, "the request must have one Host header");
    }
    let target = parsed.path.unwrap_or_default();
    if target.len() > MAX_TARGET {
        return refuse(414, "the address is longer than 4096 bytes");
    }
    (request.path, request.query) = split_target(target)?;
    Ok(Some((request, len)))
}

/// Appends a line of a header whose value is a list.
fn add(list: &mut Option<String>, value: &str) {
    match list {
        Some(list) => {
            list.push_str(", ");
            list.push_str(value);
        }
        None => *list = Some(value.to_owned()),
    }
}

/// Splits a request target, in origin form or absolute form, into path and query.
fn split_target(target: &str) -> Result<(Vec<u8>, String), Refusal> {
    let target = match target.split_once("://") {
        Some(("http" | "https", rest)) => rest.find('/').map_or("/", |at| &rest[at..]),
        _ => target,
    };
    if !target.starts_with('/') {
        return refuse(400, "the address must begin with a slash");
    }
    let target = target.split('#').next().unwrap_or_default();
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let broken = |at: usize| {
        let digits = path.as_bytes().get(at + 1..at + 3);
        !digits.is_some_and(|d| d.iter().all(u8::is_ascii_hexdigit))
    };
    if path.match_indices('%').any(|(at, _)| broken(at)) {
        return refuse(400, "a % in the address must be followed by two hexadecimal digits");
    }
    let decoded: Vec<u8> = percent_decode(path.as_bytes()).collect();
    if decoded.contains(&0) {
        return refuse(400, "the address has a zero byte in it");
    }
    Ok((normalise(&decoded)?, query.to_owned()))
}

/// Resolves `.` and `..` lexically, and preserves a trailing slash.
fn normalise(path: &[u8]) -> Result<Vec<u8>, Refusal> {
    let mut names: Vec<&[u8]> = Vec::new();
    for name in path.split(|b| *b == b'/') {
        match name {
            b"" | b"." => {}
            b".." if names.pop().is_none() => {
                return refuse(403, "the address leads out of the disk");
            }
            b".." => {}
            name => names.push(name),
        }
    }
    let mut clean = vec![b'/'];
    clean.extend_from_slice(&names.join(&b'/'));
    let is_dir = path.ends_with(b"/") || path.ends_with(b"/.") || path.ends_with(b"/..");
    if is_dir && clean.len() > 1 {
        clean.push(b'/');
    }
    Ok(clean)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path_of(target: &str) -> Result<String, u16> {
        let text = format!("GET {target} HTTP/1.1\r\nHost: x\r\n\r\n");
        match parse(text.as_bytes()) {
            Ok(Some((request, len))) => {
                assert_eq!(len, text.len());
                Ok(String::from_utf8(request.path).unwrap())
            }
            Ok(None) => panic!("not complete"),
            Err(refusal) => Err(refusal.status),
        }
    }

    #[test]
    fn request_path_is_normalized_and_cannot_escape_root() {
        assert_eq!(path_of("/"), Ok("/".into()));
        assert_eq!(path_of("/a//b/./c/../d"), Ok("/a/b/d".into()));
        assert_eq!(path_of("/a/b/"), Ok("/a/b/".into()));
        assert_eq!(path_of("/a/b/.."), Ok("/a/".into()));
        assert_eq!(path_of("/a%20b%2fc?x=%zz#y"), Ok("/a b/c".into()));
        assert_eq!(path_of("http://host:80/a?b"), Ok("/a".into()));
        assert_eq!(path_of("http://host"), Ok("/".into()));
        for outside in ["/..", "/a/../../b", "/%2e%2e/etc/passwd", "/%2e%2e%2fetc"] {
            assert_eq!(path_of(outside), Err(403), "{outside}");
        }
        for bad in ["/%", "/%4", "/%zz", "/a%00b", "*", "etc/passwd"] {
            assert_eq!(path_of(bad), Err(400), "{bad}");
        }
        assert_eq!(path_of(&format!("/{}", "x".repeat(5000))), Err(414));
    }

    #[test]
    fn invalid_request_is_rejected_with_status() {
        let status = |text: &str| parse(text.as_bytes()).unwrap_err().status;
        assert_eq!(status("\x16\x03\x01\x02hello\r\n\r\n"), 400);
        assert_eq!(status("GET / HTTP/1.1\r\n\r\n"), 400);
        assert_eq!(status("GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"), 400);
        assert_eq!(status("POST / HTTP/1.1\r\nHost: a\r\n\r\n"), 405);
        assert_eq!(status("GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n"), 413);
        assert_eq!(status("GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"), 413);
        assert_eq!(status("GET / HTTP/2.0\r\nHost: a\r\n\r\n"), 505);
        let many = "A: b\r\n".repeat(MAX_HEADERS + 1);
        assert_eq!(status(&format!("GET / HTTP/1.1\r\n{many}\r\n")), 431);
        assert_eq!(status(&format!("GET / HTTP/1.1\r\nA: {}", "b".repeat(MAX_HEAD))), 431);
    }

    #[test]
    fn request_head_is_parsed_only_when_complete() {
        let text = b"GET /x HTTP/1.0\r\nConnection: Keep-Alive\r\nRange: bytes=0-1\r\n\r\nGET";
        for end in 0..text.len() - 4 {
            assert_eq!(parse(&text[..end]), Ok(None), "{end}");
        }
        let (request, len) = parse(text).unwrap().unwrap();
        assert_eq!(&text[len..], b"GET");
        assert!(request.keep_alive && !request.head_only);
        assert_eq!(request.conditions.range.as_deref(), Some("bytes=0-1"));
    }
}
