//! The request `capture` of the control socket.

use super::POLL_INTERVAL;
use crate::process::nic::ActiveCapture;
use crate::served::SettingsLocation;
use pvio_ports::pcapng::{CaptureFile, CapturedPacket};
use pvio_ports::wrappers::capture::Reader;
use std::io::{self, BufWriter, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// How long the process of a NIC may take to send the packets that it has captured, at the end.
const END_TIMEOUT: Duration = Duration::from_secs(2);

/// How long the process of a NIC may take to begin. A NIC without a session begins with the next one.
const BEGIN_TIMEOUT: Duration = Duration::from_secs(2);

/// A running capture.
pub(super) enum Capture {
    /// By threads of this process.
    Local(Reader),
    /// In the process of the NIC.
    Remote(Box<ActiveCapture>),
}

impl Capture {
    /// Begins a capture of up to `snaplen` bytes of each packet.
    ///
    /// # Errors
    /// Another one is active.
    pub fn begin(settings: &SettingsLocation, snaplen: usize) -> io::Result<Self> {
        match settings {
            SettingsLocation::Local(settings) => {
                settings.probe.open(snaplen).map(Self::Local).map_err(io::Error::other)
            }
            SettingsLocation::Remote(point) => {
                let mut capture = Box::new(point.open(snaplen)?);
                capture.socket.wait_for_begin(BEGIN_TIMEOUT)?;
                Ok(Self::Remote(capture))
            }
        }
    }

    fn read(&mut self, each: impl FnMut(&CapturedPacket) -> io::Result<bool>) -> io::Result<()> {
        match self {
            Self::Local(reader) => reader.read(POLL_INTERVAL, each),
            Self::Remote(capture) => capture.socket.read(POLL_INTERVAL, each),
        }
    }

    /// Ends the capture, and reads the packets that were captured until now.
    fn end(&mut self, each: impl FnMut(&CapturedPacket) -> io::Result<bool>) -> io::Result<()> {
        match self {
            Self::Local(_) => Ok(()),
            Self::Remote(capture) => capture.socket.end(END_TIMEOUT, each),
        }
    }

    /// Returns the number of packets that were not captured because the reader was too slow.
    pub fn lost(&self) -> u64 {
        match self {
            Self::Local(reader) => reader.lost(),
            Self::Remote(capture) => capture.socket.lost(),
        }
    }

    /// Sends a capture file until it has the requested number of packets or the client shuts down its
    /// sending side.
    ///
    /// # Errors
    /// The client is gone, or the process of the NIC violates the protocol.
    pub fn send(
        &mut self,
        mut stream: &UnixStream,
        name: &str,
        snaplen: usize,
        count: u64,
    ) -> io::Result<()> {
        writeln!(stream, "ok")?;
        let mut file = CaptureFile::begin(BufWriter::new(stream), name, snaplen)?;
        // The file's header tells the client that the capture is running.
        file.flush()?;
        let enough = |packets: u64| count != 0 && packets >= count;
        while !enough(file.packets()) && is_client_open(stream)? {
            self.read(|record| {
                file.add(record)?;
                Ok(!enough(file.packets()))
            })?;
            file.flush()?;
        }
        if !enough(file.packets()) {
            self.end(|record| {
                file.add(record)?;
                Ok(!enough(file.packets()))
            })?;
        }
        file.end(self.lost()).map(drop)
    }
}

/// Returns whether the client has not shut down its sending side.
fn is_client_open(mut stream: &UnixStream) -> io::Result<bool> {
    stream.set_nonblocking(true)?;
    let read = stream.read(&mut [0]);
    stream.set_nonblocking(false)?;
    match read {
        Ok(0) => Ok(false),
        Ok(_) => Ok(true),
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(true),
        Err(error) => Err(error),
    }
}
