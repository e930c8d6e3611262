//! Connecting to a server: the handshake up to an export.

use super::NbdError;
use super::stream::{Dial, Stream};
use super::wire::{
    self, Greeting, InfoBlockSize, InfoExport, OptionHeader, OptionReply, info, opt, rep,
};
use crate::image::EscapedPath;
use crate::image::spec::{NbdServer, NbdSpec};
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use std::io::{self, Read, Write};
use zerocopy::big_endian::{U16, U32};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Maximum length of a reply to an option, in bytes.
const MAX_REPLY_LEN: u32 = 64 << 10;
/// Maximum number of replies to one option.
const MAX_REPLIES: u32 = 256;

/// Parameters of an export, as negotiated with its server.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Export {
    /// Size in bytes.
    pub size: u64,
    /// Transmission flags (`NBD_FLAG_…`).
    pub flags: u16,
    /// Minimum length of a request, in bytes.
    pub min_block: u32,
    /// Maximum length of a request with data, in bytes.
    pub max_block: u32,
    /// Whether replies are structured (in chunks).
    pub structured: bool,
}

impl Export {
    pub(super) const fn can(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

/// Connects to a server and negotiates the export.
pub fn connect(spec: &NbdSpec, dial: &dyn Dial) -> Result<(Stream, Export), NbdError> {
    let unreachable = |error| NbdError::Unreachable { server: name(&spec.server), error };
    let socket = dial.dial(&spec.server).map_err(unreachable)?;
    let stream = Stream::new(&spec.server, socket).map_err(unreachable)?;
    let mut handshake = Handshake { stream, spec };
    let export = handshake.negotiate()?;
    let Handshake { stream, .. } = handshake;
    stream.set_nonblocking().map_err(unreachable)?;
    Ok((stream, export))
}

/// Returns a server's address in the form operators use.
pub fn name(server: &NbdServer) -> String {
    match server {
        NbdServer::Tcp(host, port) => format!("{host}:{port}"),
        NbdServer::Unix(path) => EscapedPath::new(path).to_string(),
    }
}

/// Checks that a disk can have the shape of an export.
pub fn check(spec: &NbdSpec, export: Export) -> Result<Export, NbdError> {
    let fail = |what| NbdError::Shape {
        server: name(&spec.server),
        export: spec.export.clone(),
        size: export.size,
        block: export.min_block,
        what,
    };
    if export.min_block > 4096 || !export.min_block.is_power_of_two() {
        return Err(fail("guests can use blocks of at most 4096 bytes"));
    }
    let sector = u64::from(export.min_block.max(512));
    if export.size == 0 || !export.size.is_multiple_of(sector) {
        return Err(fail("its size is not a positive multiple of its blocks and of 512 bytes"));
    }
    if u64::from(export.max_block) < sector.max(4096) {
        return Err(fail("it does not allow requests of a page"));
    }
    Ok(export)
}

struct Handshake<'a> {
    stream: Stream,
    spec: &'a NbdSpec,
}

/// A reply to an option.
struct Reply {
    kind: u32,
    data: Vec<u8>,
}

impl Handshake<'_> {
    fn negotiate(&mut self) -> Result<Export, NbdError> {
        let mut greeting = Greeting::new_zeroed();
        self.read(greeting.as_mut_bytes())?;
        if greeting.magic != wire::GREETING || greeting.style != wire::OPTION {
            return Err(self.protocol_error("its greeting is not that of a newstyle server"));
        }
        let flags = greeting.flags.get();
        if flags & wire::FIXED_NEWSTYLE == 0 {
            return Err(self.protocol_error("it is older than the fixed newstyle handshake"));
        }
        let answer = u32::from(flags & (wire::FIXED_NEWSTYLE | wire::NO_ZEROES));
        self.write(&answer.to_be_bytes())?;

        self.option(opt::STRUCTURED_REPLY, &[])?;
        let structured = self.read_reply(opt::STRUCTURED_REPLY)?.kind == rep::ACK;
        self.go(structured)
    }

    /// Sends `NBD_OPT_GO`: selects the export and returns its parameters.
    fn go(&mut self, structured: bool) -> Result<Export, NbdError> {
        let name = self.spec.export.as_bytes();
        let mut data = U32::new(name.len() as u32).as_bytes().to_vec();
        data.extend(name);
        // The number of information requests, and the requests.
        data.extend([1, info::BLOCK_SIZE].map(U16::new).as_bytes());
        self.option(opt::GO, &data)?;
        // The protocol's defaults, for a server that does not report its block sizes.
        let mut export =
            Export { size: 0, flags: 0, min_block: 1, max_block: 32 << 20, structured };
        let mut has_size = false;
        for _ in 0..MAX_REPLIES {
            let reply = self.read_reply(opt::GO)?;
            match reply.kind {
                rep::INFO => {
                    let Ok((kind, data)) = U16::ref_from_prefix(&reply.data) else { continue };
                    match kind.get() {
                        info::EXPORT => {
                            let found: &InfoExport = self.info(data)?;
                            (export.size, export.flags) = (found.size.get(), found.flags.get());
                            has_size = true;
                        }
                        info::BLOCK_SIZE => {
                            let found: &InfoBlockSize = self.info(data)?;
                            export.min_block = found.minimum.get().max(1);
                            export.max_block = found.maximum.get();
                        }
                        _ => {}
                    }
                }
                rep::ACK if has_size => return check(self.spec, export),
                kind if kind >= rep::ERROR => return Err(self.refused(kind, &reply.data)),
                _ => return Err(self.protocol_error("an invalid reply")),
            }
        }
        Err(self.protocol_error("its reply has too many parts"))
    }

    /// Returns the information at the front of a reply's data.
    fn info<'a, T>(&self, data: &'a [u8]) -> Result<&'a T, NbdError>
    where
        T: FromBytes + KnownLayout + Immutable + Unaligned,
    {
        match T::ref_from_prefix(data) {
            Ok((info, _)) => Ok(info),
            Err(_) => Err(self.protocol_error("a reply is too short")),
        }
    }

    fn refused(&self, kind: u32, text: &[u8]) -> NbdError {
        let server = name(&self.spec.server);
        let tls = "let it listen on a Unix socket, or put a TLS proxy before it";
        let (what, remedy) = match kind {
            rep::ERR_UNKNOWN => {
                return NbdError::NoExport { server, export: self.spec.export.clone() };
            }
            rep::ERR_TLS_REQD => ("it requires TLS, which is not supported".into(), Some(tls)),
            rep::ERR_UNSUP => ("it is too old: it does not know NBD_OPT_GO".into(), None),
            rep::ERR_BLOCK_SIZE_REQD => ("it requires blocks of another size".into(), None),
            // The text comes from the server: its length is limited and control characters are
            // removed.
            _ => {
                let text: String = String::from_utf8_lossy(text).chars().take(200).collect();
                let text = text.replace(char::is_control, " ");
                let by = if kind == rep::ERR_POLICY { "its policy" } else { "it" };
                (format!("{by} rejects the option (code {:#x}) {text}", kind - rep::ERROR), None)
            }
        };
        NbdError::Refused { server, what, remedy }
    }

    fn option(&mut self, option: u32, data: &[u8]) -> Result<(), NbdError> {
        let head = OptionHeader {
            magic: wire::OPTION.into(),
            option: option.into(),
            len: (data.len() as u32).into(),
        };
        self.write(&[head.as_bytes(), data].concat())
    }

    fn read_reply(&mut self, option: u32) -> Result<Reply, NbdError> {
        let mut head = OptionReply::new_zeroed();
        self.read(head.as_mut_bytes())?;
        if head.magic != wire::OPTION_REPLY || head.option != option {
            return Err(self.protocol_error("it sends a reply without a request"));
        }
        let (kind, len) = (head.kind.get(), head.len.get());
        if len > MAX_REPLY_LEN {
            return Err(self.protocol_error("a reply is too long"));
        }
        let mut data = alloc::vec![0; len as usize];
        self.read(&mut data)?;
        Ok(Reply { kind, data })
    }

    fn read(&mut self, into: &mut [u8]) -> Result<(), NbdError> {
        let read = self.stream.read_exact(into);
        read.map_err(|error| self.lost(error))
    }

    fn write(&mut self, from: &[u8]) -> Result<(), NbdError> {
        let written = self.stream.write_all(from);
        written.map_err(|error| self.lost(error))
    }

    fn lost(&self, error: io::Error) -> NbdError {
        let error = match error.kind() {
            io::ErrorKind::WouldBlock => io::ErrorKind::TimedOut.into(),
            _ => error,
        };
        NbdError::Unreachable { server: name(&self.spec.server), error }
    }

    fn protocol_error(&self, what: &'static str) -> NbdError {
        NbdError::Protocol { server: name(&self.spec.server), what }
    }
}
