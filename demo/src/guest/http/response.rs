//! Heads of responses, and the bodies of errors.

use super::range::at;
use super::request::Refusal;
use crate::guest::fs::FsError;
use std::fmt::Write as _;
use std::time::SystemTime;

/// The fields of a response's head.
#[derive(Debug, Clone, Default)]
pub struct Head {
    /// The status code.
    pub status: u16,
    /// Length of the body in bytes, for `Content-Length`.
    pub len: u64,
    /// `Content-Type`; empty if there is no body.
    pub mime: String,
    /// `ETag`, with its quotes.
    pub etag: Option<String>,
    /// Seconds since 1970, for `Last-Modified`.
    pub modified: Option<u64>,
    /// First byte, end, and length of the whole, for `Content-Range`.
    pub range: Option<(u64, u64, u64)>,
    /// The target of a redirect, for `Location`.
    pub location: Option<String>,
    /// The contents change with every request and must not be cached.
    pub volatile: bool,
    /// The connection is kept alive.
    pub keep_alive: bool,
}

impl Head {
    /// Formats the head.
    #[must_use]
    pub fn emit(&self) -> Vec<u8> {
        let (status, reason) = (self.status, reason(self.status));
        let mut out = format!("HTTP/1.1 {status} {reason}\r\nServer: pvio\r\n");
        let _ = write!(out, "Date: {}\r\n", httpdate::fmt_http_date(SystemTime::now()));
        // For 304 it would be the length of the file, which is not sent.
        if status != 304 {
            let _ = write!(out, "Content-Length: {}\r\n", self.len);
        }
        if !self.mime.is_empty() {
            let _ =
                write!(out, "Content-Type: {}\r\nX-Content-Type-Options: nosniff\r\n", self.mime);
        }
        if let Some(etag) = &self.etag {
            let _ = write!(out, "Accept-Ranges: bytes\r\nETag: {etag}\r\n");
        }
        if let Some(modified) = self.modified {
            let _ = write!(out, "Last-Modified: {}\r\n", httpdate::fmt_http_date(at(modified)));
        }
        match (status, self.range) {
            (416, Some((_, _, len))) => _ = write!(out, "Content-Range: bytes */{len}\r\n"),
            (_, Some((first, end, len))) => {
                let _ = write!(out, "Content-Range: bytes {first}-{}/{len}\r\n", end.max(1) - 1);
            }
            (_, None) => {}
        }
        if let Some(location) = &self.location {
            let _ = write!(out, "Location: {location}\r\n");
        }
        if status == 405 {
            out.push_str("Allow: GET, HEAD\r\n");
        }
        if status == 503 {
            out.push_str("Retry-After: 2\r\n");
        }
        out.push_str(if self.volatile {
            "Cache-Control: no-store\r\n"
        } else {
            "Cache-Control: no-cache\r\n"
        });
        out.push_str(if self.keep_alive {
            "Connection: keep-alive\r\n\r\n"
        } else {
            "Connection: close\r\n\r\n"
        });
        out.into_bytes()
    }
}

const fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        206 => "Partial Content",
        301 => "Moved Permanently",
        304 => "Not Modified",
        400 => "Bad Request",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        408 => "Request Timeout",
        412 => "Precondition Failed",
        413 => "Content Too Large",
        414 => "URI Too Long",
        416 => "Range Not Satisfiable",
        431 => "Request Header Fields Too Large",
        503 => "Service Unavailable",
        505 => "HTTP Version Not Supported",
        _ => "Internal Server Error",
    }
}

/// Returns status and message for an error of the file system.
#[must_use]
pub fn status_of(e: &FsError) -> (u16, String) {
    let status = match e {
        FsError::NotFound | FsError::TooFar => 404,
        FsError::Special => 403,
        FsError::TooManyOpen | FsError::Gone => 503,
        _ => 500,
    };
    (status, e.line())
}

/// Returns the body of an error: one line.
#[must_use]
pub fn error_body(status: u16, why: &str) -> Vec<u8> {
    format!("{status} {}: {why}\n", reason(status)).into_bytes()
}

impl From<&Refusal> for (u16, String) {
    fn from(refusal: &Refusal) -> Self {
        (refusal.status, refusal.why.to_owned())
    }
}

/// Returns the content type for a file name's extension.
#[must_use]
pub fn mime_of(path: &[u8]) -> String {
    let path = String::from_utf8_lossy(path);
    let guess = mime_guess::from_path(&*path).first_raw();
    match guess {
        Some(mime) if mime.starts_with("text/") || mime.ends_with("javascript") => {
            format!("{mime}; charset=utf-8")
        }
        Some(mime) => mime.to_owned(),
        // A file without an extension, such as README or SHA256SUMS, is mostly text. With
        // `nosniff`, browsers do not guess the type, so only a type that is safe to display is set.
        None if !path.rsplit('/').next().is_some_and(|name| name.contains('.')) => {
            "text/plain; charset=utf-8".to_owned()
        }
        None => "application/octet-stream".to_owned(),
    }
}
