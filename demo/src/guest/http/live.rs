//! The live page at `/`, and the same as JSON and as Prometheus text.

use super::CONNECTIONS;
use super::listing::{self, escape};
use super::state::ServerStatus;
use crate::guest::fs::{Entry, FsError, FsInfo, Kind};
use crate::guest::meter::Reading;
use crate::guest::status::Device;
use serde::Serialize;
use std::fmt::Write as _;

/// Contents of `/.pvio/status.json`.
#[derive(Debug, Serialize)]
struct Status<'a> {
    name: &'a str,
    version: &'static str,
    address: String,
    uptime_s: u64,
    fs: Option<&'a FsInfo>,
    fs_error: Option<String>,
    devices: Vec<Device>,
    connections: usize,
    connections_max: usize,
    http: Reading,
    disk: Reading,
}

/// Returns `/.pvio/status.json`.
#[must_use]
pub fn status(server_status: &ServerStatus, connections: usize) -> Vec<u8> {
    let (fs, fs_error) = match &server_status.fs {
        Some(Ok(info)) => (Some(info), None),
        Some(Err(e)) => (None, Some(e.line())),
        None => (None, None),
    };
    let status = Status {
        name: &server_status.name,
        version: env!("CARGO_PKG_VERSION"),
        address: server_status.address.clone(),
        uptime_s: server_status.started.elapsed().as_secs(),
        fs,
        fs_error,
        devices: server_status.devices.get(),
        connections,
        connections_max: CONNECTIONS,
        http: server_status.http.read(),
        disk: server_status.disk.read(),
    };
    // Plain data cannot fail to be serialised, and an empty response would be noticed.
    serde_json::to_vec(&status).unwrap_or_default()
}

/// Returns `/.pvio/metrics`, in the Prometheus text format.
#[must_use]
pub fn metrics(server_status: &ServerStatus, connections: usize) -> Vec<u8> {
    let mut out = String::new();
    for (name, what, reading) in [
        ("http", "requests answered", server_status.http.read()),
        ("disk", "reads of the virtual disk", server_status.disk.read()),
    ] {
        let _ = write!(
            out,
            "# HELP pvio_{name}_total {what}\n# TYPE pvio_{name}_total counter\npvio_{name}_total {}\n\
             # TYPE pvio_{name}_bytes_total counter\npvio_{name}_bytes_total {}\n\
             # TYPE pvio_{name}_errors_total counter\npvio_{name}_errors_total {}\n\
             # HELP pvio_{name}_latency_seconds over the last minute\n\
             # TYPE pvio_{name}_latency_seconds gauge\n",
            reading.total, reading.total_bytes, reading.errors
        );
        let latency = reading.latency;
        let quantiles =
            [("0.5", latency.p50), ("0.9", latency.p90), ("0.99", latency.p99), ("1", latency.max)];
        for (quantile, us) in quantiles {
            let _ = writeln!(
                out,
                "pvio_{name}_latency_seconds{{quantile=\"{quantile}\"}} {}",
                us / 1e6
            );
        }
    }
    let _ = write!(
        out,
        "# TYPE pvio_connections gauge\npvio_connections {connections}\n\
         # HELP pvio_device_connected 1 while both ends are connected\n# TYPE pvio_device_connected gauge\n"
    );
    for device in server_status.devices.get() {
        let up = u8::from(device.state == "Connected" && device.backend_state == "Connected");
        let name: String =
            device.name.chars().filter(|c| c.is_ascii_alphanumeric() || *c == '-').collect();
        let _ = writeln!(out, "pvio_device_connected{{device=\"{name}\"}} {up}");
        let _ = writeln!(
            out,
            "pvio_device_reattached_total{{device=\"{name}\"}} {}",
            device.reattached
        );
    }
    out.into_bytes()
}

/// Returns the live page with the root directory, or the error of reading it.
#[must_use]
pub fn page(server_status: &ServerStatus, root: Result<(&[Entry], usize), &FsError>) -> Vec<u8> {
    let files = match root {
        Ok((entries, left_out)) => {
            let has_index = entries.iter().any(|e| e.name == b"index.html" && e.kind != Kind::Dir);
            let link =
                "<p class=\"index\"><a href=\"/index.html\">Open the disk's own index.html</a></p>";
            let link = if has_index { link } else { "" };
            format!("{link}{}", listing::table(entries, left_out, false))
        }
        Err(e) => format!("<p class=\"bad\">{}</p>", escape(&e.line())),
    };
    let html = include_str!("live.html")
        .replace("{{style}}", concat!(include_str!("listing.css"), include_str!("live.css")))
        .replace("{{script}}", include_str!("live.js"))
        .replace("{{name}}", &escape(&server_status.name))
        .replace("{{address}}", &escape(&server_status.address));
    // Replaced last, so that a file name with the text of another placeholder is not replaced.
    html.replace("{{files}}", &files).into_bytes()
}
