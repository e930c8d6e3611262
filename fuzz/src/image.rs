//! Images that are damaged, opened and used.

use arbitrary::Arbitrary;
use pvio_storage::engine::store::Store;
use pvio_storage::image::fuzz::open_store;
use pvio_storage::image::inspect::inspect;
use pvio_storage::image::{Format, ImageOptions, Spec};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};

/// What is done to an image.
#[derive(Arbitrary, Debug)]
pub struct Damage {
    template: u8,
    read_only: bool,
    /// Opens the snapshot of a qcow2 image that has one.
    snapshot: bool,
    /// Opens it below an overlay.
    overlay: bool,
    patches: Vec<Patch>,
    length: Option<u32>,
    /// Checksums of headers are corrected after the damage.
    corrected: bool,
    operations: Vec<Operation>,
}

/// A change of bytes.
#[derive(Arbitrary, Debug)]
pub enum Patch {
    /// A number in the first 64 KiB, as headers and tables have them.
    U8(u16, u8),
    /// As above, with the byte order.
    U16(u16, u16, bool),
    /// As above.
    U32(u16, u32, bool),
    /// As above.
    U64(u16, u64, bool),
    /// A small number, in units of a power of two: offsets of clusters.
    Cluster(u16, u8, u8, bool),
    /// Bytes before the end.
    Footer(u16, [u8; 4]),
    /// Text, as descriptors have it, at a distance from the start or from the first descriptor.
    Text(u16, Text),
    /// Any bytes.
    Bytes(u32, Vec<u8>),
}

/// A part of a VMDK descriptor.
#[derive(Arbitrary, Debug)]
pub enum Text {
    /// An extent.
    Extent(u8, u32, u8, u8),
    /// The identifier of the parent.
    Parent(u32),
    /// Anything.
    Any(Vec<u8>),
}

/// An operation of a guest.
#[derive(Arbitrary, Debug)]
pub enum Operation {
    /// Reads sectors.
    Read(u32, u8),
    /// Writes sectors.
    Write(u32, u8, u8),
    /// Zeroes sectors.
    Zero(u32, u16),
    /// Discards sectors.
    Discard(u32, u16),
    /// Flushes.
    Flush,
    /// Closes the image and opens it again.
    Reopen,
}

/// An undamaged image: its format and the files it consists of, the first of which is named.
pub struct Template {
    /// The format.
    pub format: Format,
    /// File name and contents: the parts that are not zero, each as offset, length and bytes.
    pub files: &'static [(&'static str, &'static [u8])],
    /// Name of its snapshot.
    pub snapshot: Option<&'static str>,
}

/// Directory of the images, in memory if possible. One process has one image at a time.
static DIR: LazyLock<PathBuf> = LazyLock::new(|| {
    let memory = Path::new("/dev/shm");
    let base = if memory.is_dir() { memory.into() } else { std::env::temp_dir() };
    let dir = base.join(format!("pvio-fuzz-{}", std::process::id()));
    std::fs::create_dir_all(&dir).expect("a directory for images");
    dir
});

/// Replaces the panic hook of libFuzzer: panics of the library `imago` are caught by pvio, and are no
/// findings. All others abort the process.
pub fn catch_library_panics() {
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        if !info.location().is_some_and(|at| at.file().contains("/imago-")) {
            before(info);
        }
    }));
}

/// A file that is written as its parts that are not zero.
struct Sparse {
    file: File,
    len: u64,
}

impl Sparse {
    /// Writes a file that is stored as such parts: offset, length, bytes. A part of length 0 is the end of
    /// the file.
    fn write(path: &Path, mut parts: &[u8]) -> Self {
        let options =
            || File::options().read(true).write(true).create(true).truncate(true).open(path);
        let mut this = Self { file: options().expect("a file in the directory"), len: 0 };
        while let Some((head, rest)) = parts.split_at_checked(8) {
            let word = |at: usize| {
                u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]])
            };
            let (at, len) = (u64::from(word(0)), word(4) as usize);
            this.resize(this.len.max(at + len as u64));
            this.put(at, &rest[..len]);
            parts = &rest[len..];
        }
        this
    }

    fn resize(&mut self, len: u64) {
        self.file.set_len(len).expect("room");
        self.len = len;
    }

    /// Overwrites bytes, as far as they are inside the file.
    fn put(&self, at: u64, bytes: &[u8]) {
        let room = self.len.saturating_sub(at).min(bytes.len() as u64);
        self.file.write_all_at(&bytes[..room as usize], at).expect("room");
    }

    fn get(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let read = self.file.read_at(&mut bytes, at).expect("a readable file");
        bytes.truncate(read);
        bytes
    }
}

/// Damages an image, inspects it, opens it and uses it. An image that is not damaged behaves as a disk.
pub fn run(templates: &[Template], damage: &Damage) {
    let template = &templates[usize::from(damage.template) % templates.len()];
    let path = DIR.join(template.files[0].0);
    for (index, (name, parts)) in template.files.iter().enumerate() {
        let mut file = Sparse::write(&DIR.join(name), parts);
        if index == 0 {
            damage.apply(template.format, &mut file);
        }
    }
    let snapshot = template.snapshot.filter(|_| damage.snapshot).map(String::from);
    let read_only = damage.read_only || snapshot.is_some();
    let mut spec = Spec::File { format: template.format, path, snapshot };
    let _ = inspect(&spec).map(|found| found.problem.map(|problem| problem.to_string()));
    if damage.overlay {
        spec = Spec::Overlay(Box::new(spec));
    }
    let whole = damage.patches.is_empty() && damage.length.is_none();
    let mut disk = None;
    let mut model = None;
    for (index, operation) in [&Operation::Reopen].into_iter().chain(&damage.operations).enumerate()
    {
        if matches!(operation, Operation::Reopen) {
            // Closing it writes back what is cached.
            drop(disk.take());
            let opened = open_store(&spec, ImageOptions { read_only, direct: false });
            assert!(
                !(whole && read_only) || opened.is_ok(),
                "an image is not opened: {:?}",
                opened.err()
            );
            let Ok((store, geometry)) = opened else { return };
            assert!(geometry.sectors < 1 << 54 && geometry.sector_size.is_power_of_two());
            if whole && (model.is_none() || damage.overlay) {
                let mut bytes = vec![0; geometry.sectors as usize * 512];
                store.read(0, &mut bytes).expect("a valid image is read");
                model = Some(bytes);
            }
            disk = Some((store, geometry.sectors));
        }
        let Some((store, sectors)) = &disk else { return };
        if *sectors == 0 || index > 64 {
            return;
        }
        // The library may panic with a damaged image; the threads that call it catch that.
        let call = || operation.call(store, *sectors, read_only, model.as_deref_mut());
        let result = catch_unwind(AssertUnwindSafe(call));
        assert!(!whole || result.is_ok(), "an operation of a valid image panics");
    }
}

impl Operation {
    fn call(
        &self,
        store: &Arc<dyn Store>,
        sectors: u64,
        read_only: bool,
        model: Option<&mut [u8]>,
    ) {
        let range = |sector: u32, count: u16| {
            let sector = u64::from(sector) % sectors;
            (sector * 512, u64::from(count.max(1)).min(sectors - sector) * 512)
        };
        let valid = model.is_some();
        let check = |result: std::io::Result<()>| {
            let unsupported = |e: &std::io::Error| e.kind() == std::io::ErrorKind::Unsupported;
            assert!(
                !valid || result.as_ref().err().is_none_or(unsupported),
                "{self:?}: {result:?}"
            );
            result.is_ok()
        };
        let part = |model: &mut [u8], at: u64, len: u64| {
            at as usize..(at + len) as usize % (model.len() + 1)
        };
        match *self {
            Self::Read(sector, count) => {
                let (at, len) = range(sector, count.into());
                let mut bytes = vec![0x11; len as usize];
                if check(store.read(at, &mut bytes))
                    && let Some(model) = model
                {
                    let range = part(model, at, len);
                    assert!(bytes == model[range], "data at {at} is not what was written");
                }
            }
            Self::Write(sector, count, value) if !read_only => {
                let (at, len) = range(sector, count.into());
                let bytes = vec![value; len as usize];
                if check(store.write(at, &bytes))
                    && let Some(model) = model
                {
                    let range = part(model, at, len);
                    model[range].fill(value);
                }
            }
            Self::Zero(sector, count) if !read_only => {
                let (at, len) = range(sector, count);
                if check(store.write_zeroes(at, len))
                    && let Some(model) = model
                {
                    let range = part(model, at, len);
                    model[range].fill(0);
                }
            }
            Self::Discard(sector, count) if !read_only => {
                let (at, len) = range(sector, count);
                // What a discarded range contains is not defined.
                if check(store.discard(at, len))
                    && let Some(model) = model
                {
                    let range = part(model, at, len);
                    store.read(at, &mut model[range]).expect("a valid image is read");
                }
            }
            Self::Flush => drop(check(store.flush())),
            _ => {}
        }
    }
}

impl Damage {
    fn apply(&self, format: Format, file: &mut Sparse) {
        if let Some(length) = self.length {
            file.resize(u64::from(length).min(4 << 20));
        }
        for patch in self.patches.iter().take(64) {
            patch.apply(file);
        }
        if self.corrected && format == Format::Vhd && file.len > 1536 {
            for (at, len, sum) in [(file.len - 512, 512, 64), (0, 512, 64), (512, 1024, 36)] {
                let mut header = file.get(at, len);
                header[sum..sum + 4].fill(0);
                let total = header.iter().fold(0_u32, |sum, byte| sum.wrapping_add((*byte).into()));
                file.put(at + sum as u64, &(!total).to_be_bytes());
            }
        }
    }
}

impl Patch {
    fn apply(&self, file: &Sparse) {
        let order = |mut bytes: Vec<u8>, big: bool| {
            if big {
                bytes.reverse();
            }
            bytes
        };
        let (at, bytes) = match self {
            Self::U8(at, value) => (u64::from(*at), vec![*value]),
            Self::U16(at, value, big) => (u64::from(*at), order(value.to_le_bytes().into(), *big)),
            Self::U32(at, value, big) => (u64::from(*at), order(value.to_le_bytes().into(), *big)),
            Self::U64(at, value, big) => (u64::from(*at), order(value.to_le_bytes().into(), *big)),
            Self::Cluster(at, value, shift, big) => {
                let value = u64::from(*value) << (9 + shift % 8);
                // Tables have entries of 8 bytes.
                (u64::from(*at) & !7, order(value.to_le_bytes().into(), *big))
            }
            Self::Footer(at, bytes) => {
                (file.len.saturating_sub(512) + u64::from(*at) % 512, bytes.to_vec())
            }
            Self::Text(at, text) => {
                let start = file.get(0, 4096);
                let words = b"# Extent description";
                let base =
                    start.windows(words.len()).position(|window| window == words).unwrap_or(0);
                (base as u64 + u64::from(*at) % 512, text.bytes())
            }
            Self::Bytes(at, bytes) => (u64::from(*at) % file.len.max(1), bytes.clone()),
        };
        file.put(at, &bytes);
    }
}

impl Text {
    fn bytes(&self) -> Vec<u8> {
        match self {
            Self::Extent(access, sectors, kind, name) => {
                let access = ["RW", "RDONLY", "NOACCESS"][usize::from(access % 3)];
                let kind = ["FLAT", "SPARSE", "ZERO", "VMFS"][usize::from(kind % 4)];
                let names =
                    ["flat-flat.vmdk", "split-s001.vmdk", "../x", "/etc/passwd", "", "flat.vmdk"];
                let name = names[usize::from(*name) % names.len()];
                format!("\n{access} {sectors} {kind} \"{name}\" 0\n").into_bytes()
            }
            Self::Parent(id) => format!("\nparentCID={id:08x}\n").into_bytes(),
            Self::Any(bytes) => bytes.clone(),
        }
    }
}
