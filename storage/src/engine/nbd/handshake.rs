//! Connecting to a server: the handshake up to an export.

use super::NbdError;
use super::stream::Stream;
use super::wire::{self, Reader, info, opt, rep};
use crate::image::Shown;
use crate::image::spec::{NbdServer, NbdSpec};
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use std::io::{self, Read, Write};
use std::time::Duration;

/// Timeout of each step.
const STEP: Duration = Duration::from_secs(5);
/// Maximum length of a reply to an option, in bytes.
const LONGEST: u32 = 64 << 10;
/// Maximum number of replies to one option.
const ANSWERS: u32 = 256;

/// Parameters of an export.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Export {
    /// Size in bytes.
    pub size: u64,
    /// Flags of [`wire::export`].
    pub flags: u16,
    /// Minimum length of a request, in bytes.
    pub min_block: u32,
    /// Maximum length of a request with data, in bytes.
    pub max_block: u32,
    /// Whether replies are structured (in chunks).
    pub structured: bool,
}

impl Export {
    pub const fn can(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

/// Connects to a server and negotiates the export.
pub fn connect(spec: &NbdSpec) -> Result<(Stream, Export), NbdError> {
    let unreachable = |error| NbdError::Unreachable { server: name(&spec.server), error };
    let stream = Stream::connect(&spec.server, STEP).map_err(unreachable)?;
    let mut talk = Talk { stream, spec };
    let export = talk.through()?;
    let Talk { stream, .. } = talk;
    stream.set_nonblocking().map_err(unreachable)?;
    Ok((stream, export))
}

/// Returns a server's address in the form operators use.
pub fn name(server: &NbdServer) -> String {
    match server {
        NbdServer::Tcp(host, port) => format!("{host}:{port}"),
        NbdServer::Unix(path) => Shown::new(path).to_string(),
    }
}

struct Talk<'a> {
    stream: Stream,
    spec: &'a NbdSpec,
}

/// A reply to an option.
struct Answer {
    kind: u32,
    data: Vec<u8>,
}

impl Talk<'_> {
    fn through(&mut self) -> Result<Export, NbdError> {
        let mut hello = [0; 18];
        self.read(&mut hello)?;
        let mut hello = Reader(&hello);
        if hello.u64() != Some(wire::GREETING) || hello.u64() != Some(wire::OPTION) {
            return Err(self.broke("its greeting is not that of a newstyle server"));
        }
        let flags = hello.u16().unwrap_or_default();
        if flags & wire::FIXED_NEWSTYLE == 0 {
            return Err(self.broke("it is older than the fixed newstyle handshake"));
        }
        let answer = u32::from(flags & (wire::FIXED_NEWSTYLE | wire::NO_ZEROES));
        self.write(&answer.to_be_bytes())?;

        self.option(opt::STRUCTURED_REPLY, &[])?;
        let structured = self.answer(opt::STRUCTURED_REPLY)?.kind == rep::ACK;
        self.go(structured)
    }

    /// Sends `NBD_OPT_GO`: selects the export and returns its parameters.
    fn go(&mut self, structured: bool) -> Result<Export, NbdError> {
        let name = self.spec.export.as_bytes();
        let mut data = (name.len() as u32).to_be_bytes().to_vec();
        data.extend(name);
        data.extend(1u16.to_be_bytes());
        data.extend(info::BLOCK_SIZE.to_be_bytes());
        self.option(opt::GO, &data)?;
        // The protocol's defaults, for a server that does not report its block sizes.
        let mut export =
            Export { size: 0, flags: 0, min_block: 1, max_block: 32 << 20, structured };
        let mut told = false;
        for _ in 0..ANSWERS {
            let answer = self.answer(opt::GO)?;
            match answer.kind {
                rep::INFO => {
                    let broken = || self.broke("an answer is too short");
                    let mut fields = Reader(&answer.data);
                    match fields.u16() {
                        Some(info::EXPORT) => {
                            export.size = fields.u64().ok_or_else(broken)?;
                            export.flags = fields.u16().ok_or_else(broken)?;
                            told = true;
                        }
                        Some(info::BLOCK_SIZE) => {
                            export.min_block = fields.u32().ok_or_else(broken)?.max(1);
                            let _preferred = fields.u32().ok_or_else(broken)?;
                            export.max_block = fields.u32().ok_or_else(broken)?;
                        }
                        _ => {}
                    }
                }
                rep::ACK if told => return self.check(export),
                kind if kind >= rep::ERROR => return Err(self.refused(kind, &answer.data)),
                _ => return Err(self.broke("an answer makes no sense")),
            }
        }
        Err(self.broke("its answer has no end"))
    }

    fn check(&self, export: Export) -> Result<Export, NbdError> {
        let fail = |what| NbdError::Shape {
            server: name(&self.spec.server),
            export: self.spec.export.clone(),
            size: export.size,
            block: export.min_block,
            what,
        };
        if export.min_block > 4096 || !export.min_block.is_power_of_two() {
            return Err(fail("blocks of at most 4096 bytes can be served to guests"));
        }
        let sector = u64::from(export.min_block.max(512));
        if export.size == 0 || !export.size.is_multiple_of(sector) {
            return Err(fail("whole sectors of 512 bytes, or whole blocks, are needed"));
        }
        if u64::from(export.max_block) < sector.max(4096) {
            return Err(fail("requests of a page must be allowed"));
        }
        Ok(export)
    }

    fn refused(&self, kind: u32, text: &[u8]) -> NbdError {
        let server = name(&self.spec.server);
        let what = match kind {
            rep::ERR_UNKNOWN => {
                return NbdError::NoExport { server, export: self.spec.export.clone() };
            }
            rep::ERR_TLS_REQD => "it wants TLS, which is not supported; let it listen on a Unix \
                                  socket, or put a TLS proxy before it"
                .into(),
            rep::ERR_UNSUP => "it is too old: it does not know NBD_OPT_GO".into(),
            rep::ERR_BLOCK_SIZE_REQD => "it insists on blocks of another size".into(),
            // The text comes from the server: its length is limited and control characters are
            // removed.
            _ => {
                let text: String = String::from_utf8_lossy(text).chars().take(200).collect();
                let text = text.replace(char::is_control, " ");
                let by = if kind == rep::ERR_POLICY { "by its policy" } else { "the option" };
                format!("{by} (code {:#x}) {text}", kind - rep::ERROR)
            }
        };
        NbdError::Refused { server, what }
    }

    fn option(&mut self, option: u32, data: &[u8]) -> Result<(), NbdError> {
        let mut message = wire::OPTION.to_be_bytes().to_vec();
        message.extend(option.to_be_bytes());
        message.extend((data.len() as u32).to_be_bytes());
        message.extend(data);
        self.write(&message)
    }

    fn answer(&mut self, option: u32) -> Result<Answer, NbdError> {
        let mut head = [0; 20];
        self.read(&mut head)?;
        let mut head = Reader(&head);
        let ours = head.u64() == Some(wire::OPTION_REPLY) && head.u32() == Some(option);
        let (Some(kind), Some(len), true) = (head.u32(), head.u32(), ours) else {
            return Err(self.broke("it answers what was not asked"));
        };
        if len > LONGEST {
            return Err(self.broke("an answer is too long"));
        }
        let mut data = alloc::vec![0; len as usize];
        self.read(&mut data)?;
        Ok(Answer { kind, data })
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

    fn broke(&self, what: &'static str) -> NbdError {
        NbdError::Protocol { server: name(&self.spec.server), what }
    }
}
