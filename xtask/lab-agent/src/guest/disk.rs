//! Writing, reading and checksums of disks.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde_json::{Value, json};

use super::direct::{Buffer, Direct};
use super::read;
use crate::pattern::{self, Random, Sum};

const SECTOR: u64 = 512;
/// Maximum length of a request of `scribble`.
const LONGEST: u64 = 1 << 20;

/// Executes the requests of this module; returns `None` for other verbs.
pub fn obey(verb: &str, arguments: &Value) -> Option<Result<Value>> {
    let arguments = arguments.clone();
    Some(match verb {
        "disk-wait" => read(arguments).and_then(|name: String| wait(&name)),
        "disk-resized" => read(arguments).and_then(|(name, sectors)| resized(name, sectors)),
        "disk-gone" => read(arguments).and_then(|name: String| gone(&name)),
        "disk-blank" => read(arguments).and_then(blank),
        "disk-scribble" => read(arguments).and_then(scribble),
        "disk-verify" => read(arguments).and_then(verify),
        "disk-flush" => read(arguments).and_then(|name: String| flush(&name)),
        "disk-refuses-writes" => read(arguments).and_then(|name: String| refuses_writes(&name)),
        _ => return None,
    })
}

fn number(name: &str, file: &str) -> Result<u64> {
    let path = format!("/sys/block/{name}/{file}");
    let text = fs::read_to_string(&path).with_context(|| path.clone())?;
    text.trim().parse().with_context(|| path)
}

/// Waits until a disk exists, has its size and all attributes that are reported: Linux creates the
/// disk before its queue, and the attributes of the queue one after the other.
fn wait(name: &str) -> Result<Value> {
    let start = Instant::now();
    loop {
        let described = describe(name);
        if start.elapsed() > Duration::from_secs(30) {
            let context = || format!("no {name} after 30 s");
            return described.and_then(|it| it.context("it has no size")).with_context(context);
        }
        if let Ok(Some(description)) = described {
            return Ok(description);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Returns the attributes of a disk, or `None` if it has no size.
fn describe(name: &str) -> Result<Option<Value>> {
    let sectors = number(name, "size")?;
    if sectors == 0 || !fs::exists(format!("/dev/{name}"))? {
        return Ok(None);
    }
    Ok(Some(json!({
        "sectors": sectors,
        "read_only": number(name, "ro")? == 1,
        "sector_size": number(name, "queue/logical_block_size")?,
        "segments": number(name, "queue/max_segments")?,
    })))
}

/// Waits until a disk has the given size.
fn resized(name: String, sectors: u64) -> Result<Value> {
    let start = Instant::now();
    loop {
        let size = number(&name, "size")?;
        if size == sectors {
            return Ok(Value::Null);
        }
        ensure!(start.elapsed() < Duration::from_secs(30), "{name} has {size} sectors after 30 s");
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn gone(name: &str) -> Result<Value> {
    let start = Instant::now();
    while fs::exists(format!("/sys/block/{name}"))? {
        ensure!(start.elapsed() < Duration::from_secs(30), "{name} is still there after 30 s");
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(Value::Null)
}

#[derive(Deserialize)]
struct Blank {
    name: String,
    mib: u64,
}

/// Writes zeros from the start of a disk.
fn blank(order: Blank) -> Result<Value> {
    let disk = Direct::open(&order.name, true)?;
    let mut buffer = Buffer::new(1 << 20);
    for mib in 0..order.mib {
        disk.write(buffer.bytes(), mib << 20)?;
    }
    Ok(Value::Null)
}

#[derive(Deserialize)]
struct Scribble {
    name: String,
    seed: u64,
    requests: u64,
    mib: u64,
}

/// Sends random requests to a disk of zeros. Verifies the data of every read, and of the whole disk
/// at the end. Returns the checksum of the expected contents.
fn scribble(order: Scribble) -> Result<Value> {
    let bytes = order.mib << 20;
    ensure!(number(&order.name, "size")? * SECTOR >= bytes, "{} is too small", order.name);
    let sector = number(&order.name, "queue/logical_block_size")?;
    let disk = Direct::open(&order.name, true)?;
    let mut shadow = vec![0; usize::try_from(bytes)?];
    let mut buffer = Buffer::new(usize::try_from(LONGEST)?);
    let mut random = Random::new(order.seed);
    for request in 0..order.requests {
        // With the same number of requests for each order of magnitude of the length.
        let longest = (sector << random.below(12)).min(LONGEST);
        let len = (random.below(longest / sector) + 1) * sector;
        let offset = random.below((bytes - len) / sector + 1) * sector;
        let place = usize::try_from(offset)?..usize::try_from(offset + len)?;
        let piece = &mut buffer.bytes()[..place.len()];
        if random.below(3) == 0 {
            disk.read(piece, offset)?;
            same(piece, &shadow[place], offset)?;
        } else {
            pattern::fill(piece, order.seed ^ request, offset);
            disk.write(piece, offset)?;
            shadow[place].copy_from_slice(piece);
        }
    }
    disk.flush()?;
    for (i, expected) in shadow.chunks(usize::try_from(LONGEST)?).enumerate() {
        let piece = &mut buffer.bytes()[..expected.len()];
        let offset = i as u64 * LONGEST;
        disk.read(piece, offset)?;
        same(piece, expected, offset)?;
    }
    let mut sum = Sum::NEW;
    sum.add(&shadow);
    Ok(json!(sum.text()))
}

fn same(found: &[u8], expected: &[u8], offset: u64) -> Result<()> {
    let Some(at) = found.iter().zip(expected).position(|(a, b)| a != b) else {
        return Ok(());
    };
    bail!("byte {} is {:#04x}, not {:#04x}", offset + at as u64, found[at], expected[at])
}

#[derive(Deserialize)]
struct Verify {
    name: String,
    seed: u64,
    mib: u64,
    write: bool,
}

/// Writes or verifies a pattern from the start of a disk.
fn verify(order: Verify) -> Result<Value> {
    let disk = Direct::open(&order.name, order.write)?;
    let mut buffer = Buffer::new(1 << 20);
    for mib in 0..order.mib {
        let offset = mib << 20;
        if order.write {
            pattern::fill(buffer.bytes(), order.seed, offset);
            disk.write(buffer.bytes(), offset)?;
            continue;
        }
        disk.read(buffer.bytes(), offset)?;
        if let Some(at) = pattern::mismatch(buffer.bytes(), order.seed, offset) {
            bail!("byte {} of {} is wrong", offset + at as u64, order.name);
        }
    }
    if order.write {
        disk.flush()?;
    }
    Ok(Value::Null)
}

/// Writes through the page cache and flushes, then writes with `O_DSYNC`. Returns the number of
/// flushes of the disk, if it has a cache.
fn flush(name: &str) -> Result<Value> {
    use std::os::unix::fs::FileExt;
    const O_DSYNC: i32 = 0o10_000;
    let cache = fs::read_to_string(format!("/sys/block/{name}/queue/write_cache"))?;
    let flushes = || -> Result<u64> {
        let stat = fs::read_to_string(format!("/sys/block/{name}/stat"))?;
        stat.split_whitespace().nth(15).context("no flushes in stat")?.parse().context("stat")
    };
    let before = flushes()?;
    let cached = fs::File::options().write(true).open(format!("/dev/{name}"))?;
    let mut bytes = vec![0; 8192];
    pattern::fill(&mut bytes, 1, 0);
    cached.write_all_at(&bytes, 0)?;
    cached.sync_data().context("fdatasync")?;
    let synced = Direct::with_flags(name, true, O_DSYNC)?;
    let mut buffer = Buffer::new(8192);
    pattern::fill(buffer.bytes(), 2, 8192);
    synced.write(buffer.bytes(), 8192)?;
    Ok(json!({ "cache": cache.trim(), "flushes": flushes()? - before }))
}

/// Checks that a disk is read-only.
fn refuses_writes(name: &str) -> Result<Value> {
    ensure!(number(name, "ro")? == 1, "{name} is not reported as read-only");
    let opened = Direct::open(name, true);
    let Ok(disk) = opened else { return Ok(Value::Null) };
    let mut buffer = Buffer::new(4096);
    buffer.bytes().fill(0xff);
    ensure!(disk.write(buffer.bytes(), 0).is_err(), "{name} was written to");
    Ok(Value::Null)
}
