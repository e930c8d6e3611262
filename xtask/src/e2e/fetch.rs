//! Files fetched with curl, compared with a directory.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::World;
use super::image::{self, Entry};
use crate::{exec, tools};

/// Timeout of all downloads together, on a busy machine.
const SLOW: Duration = Duration::from_secs(240);

/// Returns the content of a URL.
pub fn text(world: &World, url: &str) -> Result<String> {
    let mut curl = curl(world)?;
    exec::succeed(curl.args(["--max-time", "20", url]), SLOW)
}

/// Returns the HTTP status of a URL.
pub fn status(world: &World, url: &str) -> Result<String> {
    let mut curl = world.net.command(Path::new(tools::program("curl")?.get_program()))?;
    curl.args(["--silent", "--output", "/dev/null", "--write-out", "%{http_code}"]);
    exec::succeed(curl.args(["--max-time", "20", url]), SLOW)
}

/// Fetches every file from the guest at `url` and compares its checksum. Uses several connections
/// if `parallel`, else one persistent connection.
pub fn all(world: &World, url: &str, entries: &[Entry], parallel: bool) -> Result<()> {
    let into = tempfile::tempdir_in(world.dir())?;
    let mut config = String::new();
    for (i, entry) in entries.iter().enumerate() {
        let file = into.path().join(i.to_string());
        writeln!(config, "url = \"{url}{}\"", escaped(&entry.path))?;
        writeln!(config, "output = \"{}\"", file.display())?;
    }
    let list = into.path().join("list");
    fs::write(&list, config)?;
    let mut curl = curl(world)?;
    if parallel {
        curl.args(["--parallel", "--parallel-max", "8"]);
    }
    exec::succeed(curl.arg("--config").arg(&list), SLOW)?;
    for (i, entry) in entries.iter().enumerate() {
        let got = image::sum(&into.path().join(i.to_string()));
        let got = got.with_context(|| format!("{} did not arrive", entry.path))?;
        ensure!(got == entry.sum, "{} arrived with another content", entry.path);
    }
    Ok(())
}

/// Fetches a part of a file and compares it with the original.
pub fn range(world: &World, url: &str, original: &Path, from: usize, to: usize) -> Result<()> {
    let file = world.dir().join("range");
    let mut curl = curl(world)?;
    curl.args(["--range", &format!("{from}-{to}"), "--output"]).arg(&file).arg(url);
    exec::succeed(&mut curl, SLOW)?;
    let got = fs::read(&file)?;
    let whole = fs::read(original)?;
    let want = whole.get(from..=to).context("a range inside the file")?;
    if got != want {
        bail!("{} bytes came that are not bytes {from}-{to}", got.len());
    }
    Ok(())
}

/// Returns a curl command in the namespace that fails on HTTP errors.
pub fn curl(world: &World) -> Result<std::process::Command> {
    let mut curl = world.net.command(Path::new(tools::program("curl")?.get_program()))?;
    curl.args(["--fail", "--fail-early", "--silent", "--show-error"]);
    curl.args(["--globoff", "--path-as-is"]);
    Ok(curl)
}

/// Escapes a path for a URL.
fn escaped(path: &str) -> String {
    let mut url = String::new();
    for byte in path.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte) {
            url.push(char::from(byte));
        } else {
            let _ = write!(url, "%{byte:02X}");
        }
    }
    url
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn url_path_is_percent_encoded() {
        assert_eq!(escaped("a b/100%.txt"), "a%20b/100%25.txt");
        assert_eq!(escaped("ü#"), "%C3%BC%23");
    }
}
