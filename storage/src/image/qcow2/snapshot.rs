//! Reading of an internal snapshot of a qcow2 image. `imago` supports only the current state.

use super::super::Format;
use super::super::error::ImageError;
use super::super::file::Access;
use super::super::library::LibraryImage;
use super::super::metadata::{ContentError, FileContent, Meter, each_entry, try_vec};
use super::chain::Layer;
use super::header::{Header, Snapshot, incompatible};
use super::layout::{L1Entry, L2Entry};
use super::open_backing;
use crate::engine::store::Store;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use miniz_oxide::inflate::core::{DecompressorOxide, decompress, inflate_flags};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use zerocopy::IntoBytes;

/// An open snapshot.
pub(super) struct SnapshotStore {
    file: File,
    cluster_bits: u32,
    /// Whether clusters can be marked as zeroes; not in version 2.
    zeroes: bool,
    l1: Vec<L1Entry>,
    backing: Option<LibraryImage>,
}

/// Returns the snapshot with this name, or else with this id.
pub(super) fn find<'a>(layer: &'a Layer, name: &str) -> Result<&'a Snapshot, ImageError> {
    // Later writes to such an image overwrite the snapshot's data in the data file.
    if layer.header.incompatible & incompatible::DATA_FILE != 0 {
        return Err(ImageError::SnapshotOfDataFile(layer.path().into()));
    }
    let all = &layer.header.snapshots;
    let found = all.iter().find(|s| s.name == name).or_else(|| all.iter().find(|s| s.id == name));
    found.ok_or_else(|| {
        let names: Vec<&str> = all.iter().map(|s| s.name.as_str()).collect();
        let there = names.join(", ");
        ImageError::NoSnapshot { path: layer.path().into(), name: name.to_string(), there }
    })
}

fn first_level(
    file: &File,
    snapshot: &Snapshot,
    meter: &Meter,
) -> Result<Vec<L1Entry>, ContentError> {
    let (at, entries) = (snapshot.l1.0, u64::from(snapshot.l1.1));
    meter.retain(entries * 8)?;
    let mut l1 = try_vec(entries)?;
    each_entry(&FileContent::new(file, meter)?, at, entries, |_, entry| {
        l1.push(entry);
        Ok(())
    })?;
    Ok(l1)
}

impl SnapshotStore {
    /// Opens a snapshot. The header has been checked: its table lies inside the file.
    pub fn open(layer: &Layer, snapshot: &Snapshot, meter: &Meter) -> Result<Self, ImageError> {
        let access = Access { write: false, direct: false, lock: true };
        let file = layer.file.open(access)?;
        let l1 = first_level(&file, snapshot, meter);
        let l1 = l1.map_err(|error| ImageError::Content {
            path: layer.path().into(),
            format: Format::Qcow2,
            error,
        })?;
        let backing = match &layer.backing {
            Some(backing) => Some(open_backing(backing, access)?),
            None => None,
        };
        let Header { cluster_bits, version, .. } = layer.header;
        Ok(Self { file, cluster_bits, zeroes: version >= 3, l1, backing })
    }

    /// Reads a range that lies within one cluster.
    fn read_part(&self, at: u64, into: &mut [u8]) -> io::Result<()> {
        let entry = self.entry(at >> self.cluster_bits)?;
        let inside = at & ((1 << self.cluster_bits) - 1);
        if let Some(range) = entry.compressed(self.cluster_bits) {
            return self.read_compressed(range, inside, into);
        }
        match entry.cluster() {
            _ if self.zeroes && entry.is_zero() => into.fill(0),
            0 => match &self.backing {
                Some(backing) => backing.read(into, at)?,
                None => into.fill(0),
            },
            cluster => self.file.read_exact_at(into, cluster + inside)?,
        }
        Ok(())
    }

    /// Returns the second-level entry of a cluster; an empty one if there is no table.
    fn entry(&self, cluster: u64) -> io::Result<L2Entry> {
        let bits = self.cluster_bits - 3;
        let table = usize::try_from(cluster >> bits).ok().and_then(|i| self.l1.get(i));
        let mut entry = L2Entry::default();
        if let Some(table) = table.map(|entry| entry.table()).filter(|table| *table != 0) {
            let index = cluster & ((1 << bits) - 1);
            self.file.read_exact_at(entry.as_mut_bytes(), table + index * 8)?;
        }
        Ok(entry)
    }

    fn read_compressed(
        &self,
        (at, len): (u64, u64),
        inside: u64,
        into: &mut [u8],
    ) -> io::Result<()> {
        let mut packed = alloc::vec![0; len as usize];
        // The last sector of a file may be incomplete.
        let mut got = 0;
        while got < packed.len() {
            match self.file.read_at(&mut packed[got..], at + got as u64)? {
                0 => break,
                n => got += n,
            }
        }
        let mut cluster = alloc::vec![0; 1 << self.cluster_bits];
        let flags = inflate_flags::TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
        let mut inflate = DecompressorOxide::new();
        let (_, _, written) = decompress(&mut inflate, &packed[..got], &mut cluster, 0, flags);
        if written != cluster.len() {
            let what = String::from("a compressed cluster that cannot be unpacked");
            return Err(io::Error::new(io::ErrorKind::InvalidData, what));
        }
        let from = inside as usize;
        into.copy_from_slice(&cluster[from..from + into.len()]);
        Ok(())
    }
}

impl Store for SnapshotStore {
    fn read(&self, mut at: u64, mut into: &mut [u8]) -> io::Result<()> {
        while !into.is_empty() {
            let left = (1 << self.cluster_bits) - (at & ((1 << self.cluster_bits) - 1));
            let (part, rest) = into.split_at_mut(into.len().min(left as usize));
            self.read_part(at, part)?;
            at += part.len() as u64;
            into = rest;
        }
        Ok(())
    }

    fn write(&self, _: u64, _: &[u8]) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn discard(&self, _: u64, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }
}
