//! A response: its head and body, and sending it to the socket.

use super::range::Selection;
use super::request::Request;
use super::response::{Head, error_body, mime_of};
use super::state::{ServerStatus, Shared};
use super::{PART, listing, live};
use crate::guest::fs::{FsError, Handle, Meta, Target};
use smoltcp::socket::tcp;
use std::collections::VecDeque;
use std::time::Instant;

/// Maximum number of reads in flight for a response.
const IN_FLIGHT: usize = 2;

/// A response that is being sent.
#[derive(Debug)]
pub(super) struct Sending {
    pub(super) start: Instant,
    /// The head, and the body if it is in memory.
    pub(super) bytes: Vec<u8>,
    pub(super) sent: usize,
    pub(super) file: Option<FileBody>,
    pub(super) keep_alive: bool,
    pub(super) total: u64,
}

/// A file that is being sent in parts.
#[derive(Debug)]
pub(super) struct FileBody {
    handle: Handle,
    /// Offset of the next read, and end of the range.
    next: u64,
    end: u64,
    pub(super) in_flight: usize,
    pub(super) ready: VecDeque<Vec<u8>>,
    pub(super) sent: usize,
}

impl FileBody {
    pub(super) fn is_finished(&self) -> bool {
        self.next >= self.end && self.in_flight == 0 && self.ready.is_empty()
    }

    /// Sends the parts that were read to the socket.
    pub(super) fn send(&mut self, socket: &mut tcp::Socket<'_>, shared: &mut Shared) -> bool {
        let mut moved = false;
        while let Some(part) = self.ready.front() {
            let sent = socket.send_slice(&part[self.sent..]).unwrap_or(0);
            if sent == 0 {
                break;
            }
            moved = true;
            self.sent += sent;
            if self.sent == part.len() {
                self.sent = 0;
                if let Some(part) = self.ready.pop_front() {
                    shared.return_buffer(part);
                }
            }
        }
        moved
    }

    /// Requests the next parts.
    pub(super) fn ask(&mut self, token: u64, shared: &mut Shared) -> Result<bool, FsError> {
        let mut asked = false;
        while self.next < self.end && self.in_flight + self.ready.len() < IN_FLIGHT {
            // The first part ends at a boundary of the cache's chunks, so that all others are
            // aligned.
            let to_edge = PART as u64 - self.next % PART as u64;
            let len = to_edge.min(self.end - self.next);
            let buf = shared.take_buffer(len as usize);
            shared.fs.read(token, self.handle, self.next, buf)?;
            self.next += len;
            self.in_flight += 1;
            asked = true;
        }
        Ok(asked)
    }
}

impl Sending {
    pub(super) fn close_file(&mut self, shared: &mut Shared) {
        if let Some(file) = self.file.take() {
            shared.fs.close(file.handle);
            for part in file.ready {
                shared.return_buffer(part);
            }
        }
    }
}

/// Returns the response for the target of the request's path.
pub(super) fn found(
    request: &Request,
    target: Target,
    start: Instant,
    shared: &mut Shared,
    server_status: &ServerStatus,
) -> Sending {
    let html = "text/html; charset=utf-8";
    match target {
        Target::Dir { entries, left_out } if request.path == b"/" => {
            page(request, live::page(server_status, Ok((&entries, left_out))), html, start)
        }
        Target::Dir { .. } if !request.path.ends_with(b"/") => {
            let location = format!("{}/", listing::encode_path(&request.path));
            let why = format!("the directory is at {location}");
            let body = error_body(301, &why);
            let head = Head { location: Some(location), ..text_head(request, 301, body.len()) };
            sending(request, &head, body, start)
        }
        Target::Dir { entries, left_out } => {
            page(request, listing::page(&request.path, &entries, left_out), html, start)
        }
        Target::File { handle, is_index: false, .. } if request.path.ends_with(b"/") => {
            shared.fs.close(handle);
            refusal(
                request,
                404,
                "this is a file, not a directory: leave out the last slash",
                start,
            )
        }
        Target::File { handle, meta, is_index } => {
            let name: &[u8] = if is_index { b"index.html" } else { &request.path };
            file(request, handle, meta, &mime_of(name), start, shared, server_status)
        }
    }
}

fn file(
    request: &Request,
    handle: Handle,
    meta: Meta,
    mime: &str,
    start: Instant,
    shared: &mut Shared,
    server_status: &ServerStatus,
) -> Sending {
    let modified = meta.modified.and_then(|m| u64::try_from(m).ok());
    let volume = match &server_status.fs {
        Some(Ok(info)) => info.id.split('-').next().unwrap_or_default(),
        _ => "",
    };
    let etag = format!("\"{volume}-{:x}-{:x}\"", meta.len, modified.unwrap_or(0));
    let wanted = request.conditions.select(meta.len, &etag, modified, !request.head_only);
    let (status, first, end) = match wanted {
        Selection::Whole => (200, 0, meta.len),
        Selection::Part(first, end) => (206, first, end),
        Selection::NotModified => (304, 0, 0),
        Selection::Unsatisfiable => (416, 0, 0),
        Selection::Failed => (412, 0, 0),
    };
    let mut head = Head {
        status,
        len: end - first,
        mime: if status == 304 { String::new() } else { mime.to_owned() },
        etag: Some(etag),
        modified,
        range: matches!(status, 206 | 416).then_some((first, end, meta.len)),
        keep_alive: request.keep_alive,
        ..Head::default()
    };
    if matches!(status, 412 | 416) {
        let why = match status {
            412 => "the file is not the one that the request's condition names",
            _ => "the range lies outside of the file",
        };
        let body = error_body(status, why);
        (head.len, head.mime) = (body.len() as u64, "text/plain; charset=utf-8".into());
        shared.fs.close(handle);
        return sending(request, &head, body, start);
    }
    let mut answer = sending(request, &head, Vec::new(), start);
    if request.head_only || first == end {
        shared.fs.close(handle);
    } else {
        let (in_flight, ready, sent) = (0, VecDeque::new(), 0);
        answer.file = Some(FileBody { handle, next: first, end, in_flight, ready, sent });
        answer.total += end - first;
    }
    answer
}

fn text_head(request: &Request, status: u16, len: usize) -> Head {
    let mime = "text/plain; charset=utf-8".to_owned();
    Head { status, len: len as u64, mime, keep_alive: request.keep_alive, ..Head::default() }
}

pub(super) fn refusal(request: &Request, status: u16, why: &str, start: Instant) -> Sending {
    let body = error_body(status, why);
    sending(request, &text_head(request, status, body.len()), body, start)
}

pub(super) fn page(request: &Request, body: Vec<u8>, mime: &str, start: Instant) -> Sending {
    let head = text_head(request, 200, body.len());
    let head = Head { mime: mime.to_owned(), volatile: true, ..head };
    sending(request, &head, body, start)
}

fn sending(request: &Request, head: &Head, body: Vec<u8>, start: Instant) -> Sending {
    let mut bytes = head.emit();
    if !request.head_only {
        bytes.extend_from_slice(&body);
    }
    let total = bytes.len() as u64;
    Sending { start, bytes, sent: 0, file: None, keep_alive: request.keep_alive, total }
}
