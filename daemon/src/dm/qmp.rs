//! The subset of QMP that `xl` uses with a device model: a greeting, and queries about devices,
//! which have empty results.

use crate::failure::Failure;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread;

/// Maximum length of a command in bytes.
const MAX_COMMAND_BYTES: u64 = 64 * 1024;

/// Serves the connections of a socket, one at a time, until the process ends.
pub fn listen(path: &Path) -> Result<(), Failure> {
    // An earlier guest with the same number may have left its socket behind.
    let _ = std::fs::remove_file(path);
    let socket = UnixListener::bind(path).map_err(|e| {
        let what = format!("the QMP socket {} cannot be created: {e}", path.display());
        Failure::new(what, "check that its directory exists")
    })?;
    let answering = thread::Builder::new().name("qmp".into()).spawn(move || {
        for stream in socket.incoming().flatten() {
            // An error only ends this connection.
            let _ = serve_connection(&stream);
        }
    });
    answering.map(drop).map_err(|e| Failure::new(format!("the QMP thread cannot start: {e}"), ""))
}

fn serve_connection(stream: &UnixStream) -> std::io::Result<()> {
    let mut out = stream;
    let version = json!({"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": "pvio"});
    let greeting = json!({"QMP": {"version": version, "capabilities": []}});
    out.write_all(format!("{greeting}\r\n").as_bytes())?;
    let mut lines = BufReader::new(stream);
    let mut line = String::new();
    while lines.by_ref().take(MAX_COMMAND_BYTES).read_line(&mut line)? > 0 {
        if !line.trim().is_empty() {
            out.write_all(format!("{}\r\n", answer(&line)).as_bytes())?;
        }
        line.clear();
    }
    Ok(())
}

fn answer(line: &str) -> Value {
    let command: Value = serde_json::from_str(line).unwrap_or_default();
    let mut answer = match command["execute"].as_str() {
        Some("qmp_capabilities") => json!({"return": {}}),
        Some("query-status") => {
            json!({"return": {"status": "running", "running": true, "singlestep": false}})
        }
        Some("query-chardev" | "query-block" | "query-cpus-fast" | "query-blockstats") => {
            json!({"return": []})
        }
        other => {
            let what = format!("no command {} here", other.unwrap_or("at all"));
            json!({"error": {"class": "CommandNotFound", "desc": what}})
        }
    };
    if let Some(id) = command.get("id") {
        answer["id"] = id.clone();
    }
    answer
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn qmp_server_responds_to_libxl_commands() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp-libxl-7");
        std::fs::write(&path, "left behind").unwrap();
        listen(&path).unwrap();
        for _ in 0..2 {
            let stream = UnixStream::connect(&path).unwrap();
            let mut lines = BufReader::new(&stream).lines().map(|line| line.unwrap());
            let greeting: Value = serde_json::from_str(&lines.next().unwrap()).unwrap();
            assert_eq!(greeting["QMP"]["version"]["qemu"]["major"], 7);
            for (command, key) in [
                (r#"{"execute":"qmp_capabilities","id":1}"#, "return"),
                (r#"{"execute":"query-chardev","id":2}"#, "return"),
                (r#"{"execute":"device_add","id":3}"#, "error"),
                ("nonsense", "error"),
            ] {
                (&stream).write_all(format!("{command}\r\n").as_bytes()).unwrap();
                let reply: Value = serde_json::from_str(&lines.next().unwrap()).unwrap();
                assert!(reply.get(key).is_some(), "{command}: {reply}");
                let id = serde_json::from_str(command).unwrap_or(Value::Null)["id"].clone();
                assert_eq!(reply.get("id").cloned().unwrap_or(Value::Null), id);
            }
        }
    }
}
