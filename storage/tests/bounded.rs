//! The cost of opening an image is bounded, whatever its content. The number of read system calls,
//! the bytes they read and the memory of this thread are counted, not the time. A file that would
//! cost more is rejected.

mod support;

use allocation_counter::AllocationInfo;
use pvio_storage::image::inspect::inspect;
use pvio_storage::image::{
    Disk, Format, HandedFiles, Image, ImageError, ImageOptions, Spec, resolve,
};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use support::{has, text, tool};

/// Maximum cost of opening any file: what takes about a second, and memory.
const MOST: Cost = Cost { reads: 600_000, bytes: 800 << 20, memory: 64 << 20 };

#[derive(Clone, Copy, Debug)]
struct Cost {
    /// Number of system calls that read.
    reads: u64,
    /// Bytes they read.
    bytes: u64,
    /// Maximum bytes of memory at a time.
    memory: u64,
}

impl Cost {
    fn within(self, most: Self) -> bool {
        self.reads <= most.reads && self.bytes <= most.bytes && self.memory <= most.memory
    }

    /// Returns what this thread has read so far.
    fn read_by_now() -> [u64; 2] {
        let io = std::fs::read_to_string("/proc/thread-self/io").unwrap();
        ["rchar: ", "syscr: "].map(|field| {
            let value = io.lines().find_map(|line| line.strip_prefix(field)).unwrap();
            value.parse().unwrap()
        })
    }
}

/// Executes a function and returns its cost.
fn counted<T>(act: impl FnOnce() -> T) -> (T, Cost) {
    let [bytes_before, reads_before] = Cost::read_by_now();
    let mut result = None;
    let AllocationInfo { bytes_max, .. } = allocation_counter::measure(|| result = Some(act()));
    let [bytes, reads] = Cost::read_by_now();
    let cost = Cost { reads: reads - reads_before, bytes: bytes - bytes_before, memory: bytes_max };
    (result.unwrap(), cost)
}

/// Opens an image in each way, and inspects it. Each costs at most `most`. Returns the results.
fn open_within(spec: &Spec, most: Cost) -> [Result<(), ImageError>; 5] {
    let resolved = |read_only| {
        let mut disk = Disk::from(spec.clone());
        disk.options.read_only = Some(read_only);
        resolve(&disk, &HandedFiles::open_named(&disk)?).map(drop)
    };
    let open = |read_only| Image::open_disk(spec, ImageOptions { read_only, direct: false });
    let check = |how: &str, (result, cost): (Result<(), ImageError>, Cost)| {
        println!("{spec} {how}: {cost:?}, {:?}", result.as_ref().err().map(ImageError::code));
        assert!(cost.within(most), "{spec} {how}: {cost:?} is more than {most:?}");
        result
    };
    [
        check("looked at", counted(|| inspect(spec).and_then(|f| f.problem.map_or(Ok(()), Err)))),
        check("read", counted(|| open(true).map(drop))),
        check("resolved to be read", counted(|| resolved(true))),
        check("resolved to be written", counted(|| resolved(false))),
        check("written", counted(|| open(false).map(drop))),
    ]
}

/// Checks that an image is rejected in each way, within a cost.
fn refused_within(spec: &Spec, most: Cost) {
    for result in open_within(spec, most) {
        assert!(result.is_err(), "{spec} was opened");
    }
}

/// Creates a sparse file with bytes at some offsets.
fn file(dir: &Path, name: &str, length: u64, parts: &[(u64, &[u8])]) -> PathBuf {
    let path = dir.join(name);
    let file = File::create(&path).unwrap();
    file.set_len(length).unwrap();
    for (at, bytes) in parts {
        file.write_all_at(bytes, *at).unwrap();
    }
    path
}

/// A handmade qcow2 image of version 3.
#[derive(Clone)]
struct Qcow2 {
    cluster_bits: u32,
    size: u64,
    dirty: bool,
    l1: (u64, u32),
    /// Offset of the reference count table, and the number of its clusters.
    counts: (u64, u32),
    order: u32,
    snapshots: (u64, u32),
    header_length: u32,
}

impl Qcow2 {
    /// Reference counts in the second and third cluster, a first-level table in the fourth.
    fn new(cluster_bits: u32) -> Self {
        let cluster = 1 << cluster_bits;
        Self {
            cluster_bits,
            size: 1 << 30,
            dirty: false,
            l1: (3 * cluster, 1 << 10),
            counts: (cluster, 1),
            order: 4,
            snapshots: (0, 0),
            header_length: 104,
        }
    }

    fn header(&self) -> Vec<u8> {
        let mut bytes = b"QFI\xfb\0\0\0\x03".to_vec();
        bytes.resize(20, 0);
        bytes.extend(self.cluster_bits.to_be_bytes());
        bytes.extend(self.size.to_be_bytes());
        bytes.extend([0; 4]);
        bytes.extend(self.l1.1.to_be_bytes());
        bytes.extend(self.l1.0.to_be_bytes());
        bytes.extend(self.counts.0.to_be_bytes());
        bytes.extend(self.counts.1.to_be_bytes());
        bytes.extend(self.snapshots.1.to_be_bytes());
        bytes.extend(self.snapshots.0.to_be_bytes());
        bytes.extend(u64::from(self.dirty).to_be_bytes());
        bytes.extend([0; 16]);
        bytes.extend(self.order.to_be_bytes());
        bytes.extend(self.header_length.to_be_bytes());
        bytes
    }
}

/// Returns a table with `count` equal entries.
fn table(entry: u64, count: usize) -> Vec<u8> {
    entry.to_be_bytes().repeat(count)
}

fn qcow2(path: &Path) -> Spec {
    Spec::file(Format::Qcow2, path)
}

#[test]
fn ordinary_image_of_any_size_opens_with_few_reads() {
    if !has("qemu-img", "qemu-utils") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    // Blocks of counts with 16 million entries, which are not read one by one.
    let few = Cost { reads: 200, bytes: 16 << 20, memory: 16 << 20 };
    for (format, word, options, size, most) in [
        (Format::Qcow2, "qcow2", "cluster_size=2M,refcount_bits=1", "1G", few),
        (Format::Qcow2, "qcow2", "cluster_size=2M,refcount_bits=64", "64T", few),
        (Format::Qcow2, "qcow2", "cluster_size=64k", "64T", few),
        (Format::Qcow2, "qcow2", "cluster_size=64k,lazy_refcounts=on", "1T", few),
        (Format::Qcow2, "qcow2", "compat=0.10", "1T", few),
        (Format::Vhd, "vpc", "subformat=dynamic,force_size=on", "2040G", MOST),
        (Format::Vmdk, "vmdk", "subformat=monolithicSparse", "2T", MOST),
    ] {
        let path = dir.path().join("image");
        tool("qemu-img", &["create", "-f", word, "-o", options, text(&path), size]);
        for result in open_within(&Spec::file(format, &path), most) {
            result.unwrap_or_else(|error| panic!("{word} {options}: {error}"));
        }
    }
}

#[test]
fn qcow2_refcounts_are_read_in_large_blocks() {
    let dir = tempfile::tempdir().unwrap();
    let cluster = 2u64 << 20;
    // The only block of counts has the last cluster in use, bit by bit.
    for order in 0..=6 {
        let image = Qcow2 { order, ..Qcow2::new(21) };
        let mut counts = vec![0; 2 << 20];
        counts[..1 << 10].fill(0xff);
        let parts = [
            (0, &image.header()[..]),
            (cluster, &table(2 * cluster, 1)),
            (2 * cluster, &counts[..]),
        ];
        let path = file(dir.path(), "counts", 16 << 30, &parts);
        let most = Cost { reads: 200, bytes: 16 << 20, memory: 16 << 20 };
        for result in open_within(&qcow2(&path), most) {
            result.unwrap();
        }
    }
}

#[test]
fn qcow2_table_referenced_many_times_is_visited_once() {
    let dir = tempfile::tempdir().unwrap();
    let cluster = 1u64 << 16;
    // A million first-level entries refer to one second-level table, whose entries all refer to one
    // cluster. Twenty thousand snapshots have the same first-level table.
    let (l1, l2, data, counts) = (1u64 << 20, 16 << 20, 17 << 20, 18 << 20);
    let names = table(l2 | 1 << 63, 1 << 20);
    let entries = table(data | 1 << 63, 1 << 13);
    let mut snapshot = l1.to_be_bytes().to_vec();
    snapshot.extend((1u32 << 20).to_be_bytes());
    snapshot.resize(40, 0);
    let snapshots = snapshot.repeat(20_000);
    let mut image = Qcow2 {
        size: 1 << 30,
        dirty: true,
        l1: (l1, 1 << 20),
        counts: (counts, 16),
        order: 6,
        snapshots: (32 << 20, 0),
        ..Qcow2::new(16)
    };
    for count in [0, 20_000] {
        image.snapshots.1 = count;
        let block = vec![0; 2 << 16];
        let parts = [
            (0, &image.header()[..]),
            (l1, &names[..]),
            (l2, &entries[..]),
            (counts, &table(20 << 20, 1)[..]),
            (20 << 20, &block[..]),
            (32 << 20, &snapshots[..]),
        ];
        let path = file(dir.path(), "again", 40 << 20, &parts);
        let most = Cost { reads: 5000, bytes: 64 << 20, memory: MOST.memory };
        open_within(&qcow2(&path), most)[4].as_ref().expect("refcounts can be repaired");
    }
    // The maximum number of tables, none of which exists.
    let mut names = Vec::new();
    for i in 0..1u64 << 20 {
        names.extend((((1 << 24) + i) * cluster).to_be_bytes());
    }
    image.snapshots.1 = 0;
    for length in [40 << 20, 1 << 41] {
        let parts = [(0, &image.header()[..]), (l1, &names[..])];
        refused_when_written(&file(dir.path(), "nowhere", length, &parts));
    }
}

fn refused_when_written(path: &Path) {
    let [.., written] = open_within(&qcow2(path), MOST);
    assert!(written.is_err(), "{path:?} was opened for writing");
}

#[test]
fn qcow2_header_with_oversized_tables_is_rejected_at_bounded_cost() {
    let dir = tempfile::tempdir().unwrap();
    let huge = 1u64 << 40;
    let small = Cost { reads: 4000, bytes: 64 << 20, memory: 40 << 20 };
    let plain = Qcow2::new(16);
    for (what, image) in [
        ("first level", Qcow2 { l1: (1 << 30, 4 << 20), ..plain.clone() }),
        ("counts", Qcow2 { counts: (1 << 30, u32::MAX), ..plain.clone() }),
        ("snapshots", Qcow2 { snapshots: (1 << 30, u32::MAX), ..plain.clone() }),
        ("empty snapshots", Qcow2 { snapshots: (1 << 30, 65536), ..plain.clone() }),
        ("header", Qcow2 { header_length: 1 << 20, cluster_bits: 21, ..plain.clone() }),
    ] {
        let path = file(dir.path(), what, huge, &[(0, &image.header())]);
        refused_within(&qcow2(&path), small);
    }
    // A quarter of a million extensions without an end marker.
    for extension in [0x1234_5678_0000_0000, 0x1234_5678_ffff_ffff] {
        let image = Qcow2 { l1: (6 << 20, 1 << 10), counts: (2 << 20, 1), ..Qcow2::new(21) };
        let extensions = table(extension, (2 << 20) / 8 - 13);
        let parts = [(0, &image.header()[..]), (104, &extensions[..])];
        refused_within(&qcow2(&file(dir.path(), "extensions", huge, &parts)), small);
    }
    // Snapshots whose names have the maximum length.
    let mut snapshot = (3u64 << 16).to_be_bytes().to_vec();
    snapshot.extend((1u32 << 10).to_be_bytes());
    snapshot.extend([0xff; 4]);
    snapshot.resize(40, 0);
    snapshot.resize(40 + 2 * 65535, 0xff);
    snapshot.resize(snapshot.len().next_multiple_of(8), 0);
    let image = Qcow2 { snapshots: (1 << 30, 60_000), ..plain };
    let snapshots = snapshot.repeat(64);
    let parts = [(0, &image.header()[..]), (1 << 30, &snapshots[..])];
    refused_within(&qcow2(&file(dir.path(), "names", huge, &parts)), small);
}

#[test]
fn qcow2_with_scattered_refcount_blocks_opens_at_bounded_cost() {
    let dir = tempfile::tempdir().unwrap();
    for (bits, order) in [(9, 0), (9, 6), (12, 4), (16, 6), (21, 0), (21, 6)] {
        // A table of maximum length, in which each entry refers to its own block, and a file of
        // matching size.
        let cluster = 1u64 << bits;
        let clusters = (8u64 << 20) / cluster;
        let counts = (1 << 24, clusters as u32);
        let l1 = (0, 0);
        let image = Qcow2 { dirty: true, size: 0, l1, counts, order, ..Qcow2::new(bits) };
        let blocks: Vec<u8> =
            (0..1u64 << 20).flat_map(|i| ((1 << 25) + i * cluster).to_be_bytes()).collect();
        let mut image = image;
        for dirty in [false, true] {
            image.dirty = dirty;
            let parts = [(0, &image.header()[..]), (1 << 24, &blocks[..])];
            let path = file(dir.path(), "counts", (1 << 25) + (cluster << 20), &parts);
            let _ = open_within(&qcow2(&path), MOST);
        }
    }
}

#[test]
fn long_backing_chain_is_rejected_at_bounded_cost() {
    let dir = tempfile::tempdir().unwrap();
    let mut below: Option<String> = None;
    // Each image has a table of half a MiB, extensions, and 2 MiB of counts.
    for n in 0..150 {
        let image = Qcow2 { l1: (8 << 20, 1 << 16), ..Qcow2::new(21) };
        let mut header = image.header();
        for _ in 0..60 {
            header.extend((0x1234_5678_u64 << 32 | 1000).to_be_bytes());
            header.resize(header.len() + 1000, 0);
        }
        header.extend((0xe279_2aca_u64 << 32 | 5).to_be_bytes());
        header.extend(b"qcow2\0\0\0");
        header.extend([0; 8]);
        if let Some(below) = &below {
            let at = header.len() as u64;
            header[8..16].copy_from_slice(&at.to_be_bytes());
            header[16..20].copy_from_slice(&(below.len() as u32).to_be_bytes());
            header.extend(below.as_bytes());
        }
        let parts =
            [(0, &header[..]), (2 << 20, &table(4 << 20, 1)[..]), (4 << 20, &[0xff; 8][..])];
        let name = format!("{n}.qcow2");
        let path = file(dir.path(), &name, 16 << 20, &parts);
        below = Some(name);
        if n % 50 == 3 {
            let _ = open_within(&qcow2(&path), MOST);
        }
    }
    refused_within(&qcow2(&dir.path().join("149.qcow2")), MOST);
}

/// Sets the checksum of a VHD footer or header.
fn summed(mut bytes: Vec<u8>, at: usize) -> Vec<u8> {
    let sum = bytes.iter().fold(0u32, |sum, byte| sum.wrapping_add(u32::from(*byte)));
    bytes[at..at + 4].copy_from_slice(&(!sum).to_be_bytes());
    bytes
}

#[test]
fn vhd_with_too_many_blocks_is_rejected_at_bounded_cost() {
    let dir = tempfile::tempdir().unwrap();
    let size = 2040u64 << 30;
    for block in [4096u32, 65536, 2 << 20] {
        let blocks = u32::try_from(size / u64::from(block)).unwrap();
        let mut footer = b"conectix".to_vec();
        footer.resize(512, 0);
        footer[16..24].copy_from_slice(&512u64.to_be_bytes());
        footer[48..56].copy_from_slice(&size.to_be_bytes());
        footer[60..64].copy_from_slice(&3u32.to_be_bytes());
        let footer = summed(footer, 64);
        let mut header = b"cxsparse".to_vec();
        header.resize(1024, 0);
        header[16..24].copy_from_slice(&1536u64.to_be_bytes());
        header[28..32].copy_from_slice(&blocks.to_be_bytes());
        header[32..36].copy_from_slice(&block.to_be_bytes());
        let header = summed(header, 36);
        let end = 1536 + (u64::from(blocks) * 4).next_multiple_of(512);
        // If every entry refers to a block, all blocks are in the same place.
        for filled in [0u32, 8] {
            let entries = vec![0xff; filled as usize];
            let parts =
                [(0, &footer[..]), (512, &header[..]), (1536, &entries[..]), (end, &footer[..])];
            let path = file(dir.path(), "a.vhd", end + 512, &parts);
            refused_within(&Spec::file(Format::Vhd, &path), MOST);
        }
    }
}

/// Returns the header of a sparse VMDK.
fn vmdk(sectors: u64, grain: u64, entries: u32, directory: u64, unclean: bool) -> Vec<u8> {
    let mut bytes = b"KDMV\x01\0\0\0\x03\0\0\0".to_vec();
    bytes.extend(sectors.to_le_bytes());
    bytes.extend(grain.to_le_bytes());
    bytes.extend(1u64.to_le_bytes());
    bytes.extend(1u64.to_le_bytes());
    bytes.extend(entries.to_le_bytes());
    bytes.extend((1u64 << 20).to_le_bytes());
    bytes.extend(directory.to_le_bytes());
    bytes.extend(0u64.to_le_bytes());
    bytes.push(unclean.into());
    bytes.extend(b"\n \r\n");
    bytes.resize(512, 0);
    let text = format!(
        "# Disk DescriptorFile\nCID=12345678\nparentCID=ffffffff\ncreateType=\"monolithicSparse\"\n\
         RW {sectors} SPARSE \"a.vmdk\"\n"
    );
    bytes.extend(text.as_bytes());
    bytes
}

#[test]
fn vmdk_with_many_grains_opens_at_bounded_cost() {
    let dir = tempfile::tempdir().unwrap();
    for (sectors, grain, entries) in [
        (1 << 26, 1, 1),
        (1 << 26, 1, 512),
        (1 << 33, 128, 512),
        (1 << 33, 128, 1),
        (1 << 32, 128, 512),
    ] {
        let directory = 1 << 21;
        let tables = (sectors / grain / u64::from(entries)) as u32;
        // Each table refers to grains throughout the file.
        let names: Vec<u8> =
            (0..tables.min(1 << 20)).flat_map(|i| ((1 << 23) + i * 4).to_le_bytes()).collect();
        let grains: Vec<u8> = (0..1u32 << 23).flat_map(|i| (i * 128).to_le_bytes()).collect();
        for unclean in [false, true] {
            let header = vmdk(sectors, grain, entries, directory, unclean);
            let parts = [(0, &header[..]), (directory * 512, &names[..]), (4 << 30, &grains[..])];
            let path = file(dir.path(), "a.vmdk", (4 << 30) + (1 << 32), &parts);
            let _ = open_within(&Spec::file(Format::Vmdk, &path), MOST);
        }
    }
}

#[test]
fn vmdk_descriptor_with_too_many_extents_is_rejected_at_bounded_cost() {
    let dir = tempfile::tempdir().unwrap();
    let extents = "RW 1 FLAT \"flat\" 0\n".repeat(50_000);
    let text = format!(
        "# Disk DescriptorFile\nCID=1\nparentCID=ffffffff\ncreateType=\"custom\"\n{extents}"
    );
    std::fs::write(dir.path().join("flat"), vec![0; 512]).unwrap();
    let small = Cost { reads: 100, bytes: 4 << 20, memory: 16 << 20 };
    let path = dir.path().join("a.vmdk");
    std::fs::write(&path, &text).unwrap();
    refused_within(&Spec::file(Format::Vmdk, &path), small);
    let path = file(dir.path(), "b.vmdk", 1 << 40, &[(0, text.as_bytes())]);
    refused_within(&Spec::file(Format::Vmdk, &path), small);
}
