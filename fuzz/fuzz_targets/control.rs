//! The control socket with a client that sends anything.
//!
//! A request gets one reply, whose first line says whether it succeeded.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use pvio_daemon::control::{Control, NAME};
use pvio_daemon::served::Served;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::OnceLock;
use std::time::Duration;
use tempfile::TempDir;

#[derive(Arbitrary, Debug)]
enum Input {
    Words(Vec<Word>),
    Bytes(Vec<u8>),
    /// A line longer than any request.
    Long(u8, u16),
}

#[derive(Arbitrary, Debug)]
enum Word {
    List,
    Stats,
    Confinement,
    Upgrade,
    UpgradeStatus,
    Capture,
    Number(u64),
    Text(String),
    Break,
}

impl Word {
    fn text(self) -> String {
        match self {
            Self::List => "list".into(),
            Self::Stats => "stats".into(),
            Self::Confinement => "confinement".into(),
            Self::Upgrade => "upgrade".into(),
            Self::UpgradeStatus => "upgrade-status".into(),
            Self::Capture => "capture".into(),
            Self::Number(number) => number.to_string(),
            Self::Text(text) => text,
            Self::Break => "\n".into(),
        }
    }
}

fuzz_target!(|input: Input| {
    static SERVER: OnceLock<(TempDir, Control)> = OnceLock::new();
    let (dir, _) = SERVER.get_or_init(|| {
        let dir = tempfile::tempdir().expect("a directory");
        let control = Control::listen(dir.path(), &Served::default()).expect("a socket");
        (dir, control)
    });
    let bytes = match input {
        Input::Words(words) => {
            let words: Vec<_> = words.into_iter().map(Word::text).collect();
            (words.join(" ") + "\n").into_bytes()
        }
        Input::Bytes(bytes) => bytes,
        Input::Long(byte, len) => vec![byte; len.into()],
    };
    let mut client = UnixStream::connect(dir.path().join(NAME)).expect("a listening server");
    client.set_read_timeout(Some(Duration::from_secs(8))).expect("a socket");
    client.set_write_timeout(Some(Duration::from_secs(8))).expect("a socket");
    // The server may have read enough, and have closed the connection.
    let _ = client.write_all(&bytes);
    let _ = client.shutdown(Shutdown::Write);
    let mut reply = Vec::new();
    if let Err(error) = client.read_to_end(&mut reply) {
        // The rest of a long line was not read.
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "no reply");
    }
    let line = String::from_utf8_lossy(&reply);
    let line = line.lines().next().unwrap_or_default();
    let is_text = std::str::from_utf8(&bytes).is_ok();
    let said = line == "ok" || line.starts_with("error ") || (line.is_empty() && !is_text);
    assert!(said || bytes.len() >= 5000, "the reply {line:?}");
    assert!(!line.contains(|c: char| c.is_control() && c != '\t'), "the reply {line:?}");
});
