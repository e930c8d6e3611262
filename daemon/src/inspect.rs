//! `pvio inspect`: format, size and chain of a disk image, and whether it can be served.

use crate::disks::args::ImageRootArgs;
use crate::failure::{Failure, one_line, say};
use crate::units::human;
use clap::Args;
use pvio_storage::image::inspect::{FileReport, Inspection, inspect_as};
use pvio_storage::image::{Disk, EscapedPath, LockState, Spec};
use serde_json::{Value, json};
use std::ffi::OsStr;
use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;

/// Arguments of `pvio inspect`.
#[derive(Debug, Clone, Args)]
pub struct InspectArgs {
    /// A path, or FORMAT:PATH with raw, qcow2, qcow2@SNAPSHOT, vmdk or vhd, or nbd://HOST:PORT/EXPORT,
    /// nbd+unix:///EXPORT?socket=PATH
    #[arg(value_name = "DISK")]
    pub disk: OsString,
    /// As JSON
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    /// Directories of the files that the image names.
    pub image_roots: ImageRootArgs,
}

/// Runs the command.
///
/// # Errors
/// A [`Failure`] if the image does not exist, or cannot be served. In the latter case, everything
/// that could be read is printed first.
pub fn run(args: &InspectArgs) -> Result<(), Failure> {
    let disk = Disk::from_bytes(args.disk.as_bytes());
    let mut disk = disk.map_err(|e| Failure::of(e).as_input())?;
    args.image_roots.add_to(&mut disk.options)?;
    let found = inspect_as(&disk).map_err(|e| Failure::of(e).as_input())?;
    if args.json {
        say!("{:#}", as_json(&disk.spec, &found));
    } else {
        as_text(&disk.spec, &found);
    }
    match found.problem {
        Some(problem) => Err(Failure::of(problem)),
        None => Ok(()),
    }
}

fn as_text(spec: &Spec, found: &Inspection) {
    say!("disk        {}", one_line(&spec.to_string()));
    if let Some(size) = found.size {
        say!("size        {} ({size} bytes)", human(size));
    }
    for (i, file) in found.files.iter().enumerate() {
        say!("{}{}", if i == 0 { "file        " } else { "rests on    " }, path(file));
        say!("  format    {}", described(file));
        say!("  on disk   {} of {}", human(file.allocated), human(file.length));
        say!("  in use    {}", in_use(file.lock));
        for snapshot in &file.snapshots {
            let name = one_line(&snapshot.name);
            say!("  snapshot  {name} (id {}), {}", one_line(&snapshot.id), human(snapshot.size));
        }
        if let Some(other) = file.resembles {
            say!(
                "  beware    it begins like a {0} image: if it is one, name it {0}:{1}",
                other.word(),
                path(file)
            );
        }
    }
    for file in &found.files {
        if let Some(other) = file.resembles_foreign {
            say!(
                "  beware    {} begins like a {other} image, and is served byte by byte: if it was \
                 created as one and no guest wrote that, use qemu-img convert -f {other} -O qcow2 OLD NEW.qcow2",
                path(file)
            );
        }
    }
    if found.problem.is_none() {
        say!(
            "it can be served{}",
            if is_written(found) { " when no other process writes it" } else { "" }
        );
    }
}

fn described(file: &FileReport) -> String {
    let mut text = String::from(file.format.word());
    for feature in &file.features {
        text = text + ", " + feature;
    }
    text
}

/// Adds a byte string, such as a file name, to an object. It is added as text and, if it is not
/// UTF-8, also as the key `KEY_hex` in hexadecimal digits; the text then has escapes for the
/// invalid bytes ([`EscapedPath`]).
pub(crate) fn put_bytes(object: &mut Value, key: &str, bytes: &[u8]) {
    if let Ok(text) = std::str::from_utf8(bytes) {
        object[key] = text.into();
        return;
    }
    object[key] = EscapedPath::new(OsStr::from_bytes(bytes)).to_string().into();
    let digits: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    object[format!("{key}_hex")] = digits.into();
}

fn path(file: &FileReport) -> String {
    EscapedPath::new(&file.path).to_string()
}

fn is_written(found: &Inspection) -> bool {
    found.files.first().is_some_and(|file| file.lock == LockState::Written)
}

fn in_use(lock: LockState) -> &'static str {
    match lock {
        LockState::Free => "no",
        LockState::Read => "read by another process",
        LockState::Written => "written by another process",
    }
}

fn as_json(spec: &Spec, found: &Inspection) -> Value {
    let file = |file: &FileReport| {
        let snapshots = file
            .snapshots
            .iter()
            .map(|s| json!({ "id": s.id, "name": s.name, "seconds": s.seconds, "size": s.size }));
        let mut all = json!({
            "format": file.format.word(),
            "length": file.length,
            "allocated": file.allocated,
            "lock": match file.lock {
                LockState::Free => "free",
                LockState::Read => "read",
                LockState::Written => "written",
            },
            "size": file.size,
            "features": file.features,
            "snapshots": snapshots.collect::<Value>(),
            "resembles": file.resembles.map(|format| format.word()).or(file.resembles_foreign),
        });
        put_bytes(&mut all, "path", file.path.as_os_str().as_bytes());
        all
    };
    let mut all = json!({
        "size": found.size,
        "files": found.files.iter().map(file).collect::<Value>(),
        "problem": found.problem.as_ref().map(|p| json!({ "code": p.code(), "text": p.to_string() })),
    });
    put_bytes(&mut all, "disk", &spec.to_bytes());
    all
}
