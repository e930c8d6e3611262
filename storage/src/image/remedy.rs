//! What an operator can do about each error of an image.

use super::Format;
use super::error::{ImageError, ReferenceProblem};
use super::metadata::ContentError;
use alloc::borrow::Cow;
use alloc::format;
use pvio_ring::error::Remedy;

impl Remedy for ImageError {
    fn remedy(&self) -> Option<Cow<'static, str>> {
        Some(match self {
            Self::Missing(_) => {
                "check the path, and that the file system it is on is mounted".into()
            }
            Self::Permission(..) => "check its owner and mode with ls -l".into(),
            Self::NotADisk(_) => "name a disk image".into(),
            Self::OddSize { size, unit, .. } => {
                let larger = larger(*size, *unit);
                format!(
                    "check that it was copied whole, then make it larger, to {larger} bytes \
                     (truncate -s {larger} for a raw file, qemu-img resize for others)"
                )
                .into()
            }
            Self::Busy(_) => "stop that program first, or open the image read-only in both".into(),
            Self::Fence { .. } => {
                "check whether its storage hangs, then detach the disk and attach it again".into()
            }
            Self::NoDirect(_) => "leave the option direct out".into(),
            Self::DirectSize { .. } => {
                "leave the option direct out, or copy the image to a larger one whose size is a \
                 multiple"
                    .into()
            }
            Self::Content { format, error, .. } => return of_content(*format, error),
            Self::Chain { remedy, .. } => (*remedy).into(),
            Self::Reference { problem, .. } => problem.remedy().into(),
            Self::NoSnapshot { there, .. } if there.is_empty() => {
                "serve the image itself: it has no snapshots".into()
            }
            Self::NoSnapshot { there, .. } => {
                format!("name one of the snapshots it has: {there}").into()
            }
            Self::SnapshotOfDataFile(_) => {
                "serve the image itself, or restore a backup of the snapshot".into()
            }
            Self::OnlyRead(disk) => format!("serve it read-only, or as overlay:{disk}").into(),
            Self::Nbd(error) => return error.remedy(),
            Self::Sectors { .. } => {
                "leave the option sector out, or choose a size that is possible".into()
            }
            Self::NoIoMode(..) => "leave the option io out".into(),
            Self::SqPoll(_) => "leave io=sqpoll out".into(),
            Self::PollBuffered(_) => "write [io=iopoll,direct], or leave io=iopoll out".into(),
            Self::NoPoll { .. } => {
                "give its device's driver queues for polling (nvme.poll_queues=2 or \
                 virtio_blk.poll_queues=1 on the kernel's command line), or leave io=iopoll out"
                    .into()
            }
            Self::Trace { .. } => "name a new file, or a directory".into(),
            Self::Memory(_) => "make the disk smaller".into(),
            Self::Changed { .. } => {
                "attach the disk again, and let no other program change its images".into()
            }
            Self::Other { .. } => return None,
        })
    }
}

impl ReferenceProblem {
    const fn remedy(&self) -> &'static str {
        match self {
            Self::Outside(_) => {
                "if this image may use that file, name the file's directory with --image-root DIR \
                 or [image-root=DIR]"
            }
            Self::LinkOutside => {
                "if this image may use that file, name the directory that the link leads to with \
                 --image-root DIR or [image-root=DIR]"
            }
            Self::Root(..) => "check --image-root and [image-root=DIR]",
            Self::Missing => {
                "restore the file from where this image was copied from, or check that the file \
                 system it is on is mounted"
            }
            Self::NotADisk => "check the program that created this image",
            Self::NotDerived | Self::WrittenLink => {
                "serve the image read-only, or, if you trust the image, allow the name with \
                 [write-extents=any]"
            }
            Self::NoOpenat2 => {
                "allow openat2 in the container's seccomp profile, or serve an image that names no \
                 other file"
            }
            Self::System(_) => "check its owner and mode with ls -l",
        }
    }
}

/// Returns the smallest valid size of an image that is not smaller than its current one.
fn larger(size: u64, unit: u32) -> u64 {
    size.next_multiple_of(unit.into()).max(unit.into())
}

fn of_content(format: Format, error: &ContentError) -> Option<Cow<'static, str>> {
    Some(match error {
        // A fixed VHD image is recognized by its end alone.
        ContentError::NotThis("vhd") => {
            "if it was cut short, copy it again, whole, or, if it is a raw image, name it raw:PATH"
                .into()
        }
        ContentError::NotThis(_) => "if it is a raw image, name it raw:PATH".into(),
        ContentError::Corrupt(_) => {
            "restore a backup, or examine a copy with qemu-img check".into()
        }
        ContentError::Truncated(_) => "copy it again, whole".into(),
        ContentError::Encrypted(_) => {
            "decrypt it into a new image with qemu-img convert, or let the guest encrypt its disk"
                .into()
        }
        ContentError::Parent => {
            // `qemu-img` reads a VHD without its parent and reports no error.
            let by = match format {
                // Merging into the parent is not suggested, because other images may depend on it.
                Format::Vhd => "Convert-VHD of Hyper-V",
                _ => "vmkfstools -i or vmware-vdiskmanager -r",
            };
            format!(
                "make a new image of both with the program that created them ({by}): qemu-img \
                 convert may leave out all that is in the parent"
            )
            .into()
        }
        ContentError::Extent => "name the file with the descriptor, which names all extents".into(),
        ContentError::Unsupported(_) => {
            // The format is given explicitly, because a detected format is under the guest's
            // control.
            let qemu = if format == Format::Vhd { "vpc" } else { format.word() };
            format!(
                "convert it: qemu-img convert -f {qemu} -O qcow2 OLD NEW.qcow2 (internal snapshots \
                 are not copied: keep the old image)"
            )
            .into()
        }
        ContentError::Io(_) => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::nbd::NbdError;
    use crate::image::{OptionError, Spec, SpecError};
    use alloc::string::String;
    use alloc::vec::Vec;
    use pvio_ring::error::{Report, without_remedy};

    /// Returns an error's text, causes and remedy.
    fn whole(error: &impl Remedy) -> String {
        format!("{}; {}", Report(error), error.remedy().unwrap_or_default())
    }

    /// Returns every message with a remedy for an image's content.
    fn remedies() -> Vec<String> {
        let mut texts = Vec::new();
        for format in [Format::Raw, Format::Qcow2, Format::Vmdk, Format::Vhd] {
            for error in [
                ContentError::NotThis(format.word()),
                ContentError::corrupt("x"),
                ContentError::truncated("x"),
                ContentError::Encrypted("LUKS"),
                ContentError::Parent,
                ContentError::Extent,
                ContentError::unsupported("x"),
            ] {
                let path = "/a".into();
                texts.push(whole(&ImageError::Content { path, format, error }));
            }
        }
        texts.push(whole(&ImageError::OddSize { path: "/a".into(), size: 513, unit: 512 }));
        texts.push(whole(&ImageError::DirectSize { path: "/a".into(), size: 512, unit: 4096 }));
        texts.push(whole(&ImageError::SnapshotOfDataFile("/a".into())));
        for problem in [ReferenceProblem::Missing, ReferenceProblem::NotADisk] {
            let (image, name) = ("/a".into(), "b".into());
            texts.push(whole(&ImageError::Reference { image, name, problem }));
        }
        for format in ["vhdx", "vdi", "qed", "parallels"] {
            let refused: Result<Spec, SpecError> = format!("{format}:/a").parse();
            texts.push(whole(&refused.unwrap_err()));
        }
        texts
    }

    fn all() -> Vec<ImageError> {
        let path = || std::path::PathBuf::from("/a");
        let error = || std::io::Error::other("x");
        let disk = || String::from("disk");
        let reference = |problem| ImageError::Reference { image: path(), name: path(), problem };
        let content = |error| ImageError::Content { path: path(), format: Format::Vmdk, error };
        std::vec![
            ImageError::Missing(path()),
            ImageError::Permission(path(), ""),
            ImageError::NotADisk(path()),
            ImageError::OddSize { path: path(), size: 1, unit: 512 },
            ImageError::Busy(path()),
            ImageError::Fence { disk: disk(), error: error() },
            ImageError::NoDirect(path()),
            ImageError::DirectSize { path: path(), size: 1, unit: 512 },
            ImageError::Chain { path: path(), below: disk(), what: "x", remedy: "y" },
            ImageError::NoSnapshot { path: path(), name: disk(), there: String::new() },
            ImageError::SnapshotOfDataFile(path()),
            ImageError::OnlyRead(disk()),
            ImageError::Sectors { disk: disk(), sector_size: 4096, least: 512, size: 1 },
            ImageError::NoIoMode("sqpoll", disk()),
            ImageError::SqPoll(error()),
            ImageError::PollBuffered(disk()),
            ImageError::NoPoll { disk: disk(), error: error() },
            ImageError::Trace { path: path(), error: error() },
            ImageError::Memory(1),
            ImageError::Other { path: path(), error: error() },
            reference(ReferenceProblem::Outside(Vec::new())),
            reference(ReferenceProblem::LinkOutside),
            reference(ReferenceProblem::Root(path(), error())),
            reference(ReferenceProblem::Missing),
            reference(ReferenceProblem::NotADisk),
            reference(ReferenceProblem::NotDerived),
            reference(ReferenceProblem::WrittenLink),
            reference(ReferenceProblem::NoOpenat2),
            reference(ReferenceProblem::System(error())),
            content(ContentError::NotThis("vmdk")),
            content(ContentError::NotThis("vhd")),
            content(ContentError::corrupt("x")),
            content(ContentError::truncated("x")),
            content(ContentError::Encrypted("LUKS")),
            content(ContentError::Parent),
            content(ContentError::Extent),
            content(ContentError::unsupported("x")),
            content(ContentError::Io(error())),
        ]
    }

    #[test]
    fn errors_have_a_remedy_or_are_listed() {
        let all = all();
        let all: Vec<&dyn Remedy> = all.iter().map(|error| error as &dyn Remedy).collect();
        // The remedy of an error of the system, or of reading, depends on the cause.
        assert_eq!(without_remedy(&all), ["Other", "Content"]);
        let server = || String::from("s");
        let refused = |remedy| NbdError::Refused { server: server(), what: server(), remedy };
        let none = without_remedy(&[
            &NbdError::Unreachable { server: server(), error: std::io::Error::other("x") },
            &NbdError::Protocol { server: server(), what: "x" },
            &NbdError::NoExport { server: server(), export: server() },
            &refused(None),
            &refused(Some("y")),
            &NbdError::ReadOnly { server: server(), export: server() },
            &NbdError::Shape { server: server(), export: server(), size: 1, block: 1, what: "x" },
            &SpecError::Empty,
            &SpecError::UnknownFormat("x".into()),
            &SpecError::Foreign("vdi"),
            &SpecError::Size("x".into()),
            &SpecError::Nbd("x".into()),
            &OptionError::Unknown("x".into()),
            &OptionError::Value { key: "iops", value: "x".into(), form: "N" },
            &OptionError::Flag("ro"),
            &OptionError::Unclosed,
        ]);
        assert_eq!(none, ["Refused"]);
    }

    #[test]
    fn remedies_never_suggest_data_loss_or_dropping_parent_image() {
        for text in remedies() {
            // Commands that change an image in place, or create an empty one in place of a missing
            // one.
            for word in
                ["-r all", "coalesce", "Merge-VHD", "qemu-img create", "commit", "amend", "dd "]
            {
                assert!(!text.contains(word), "{word} in: {text}");
            }
            // A conversion leaves the old image unchanged.
            if let Some((_, how)) = text.split_once("-O qcow2") {
                assert!(how.starts_with(" OLD NEW.qcow2"), "{text}");
            }
            if text.contains("truncate -s") {
                assert!(text.contains("truncate -s 1024 "), "it is made larger: {text}");
            }
        }
        for format in [Format::Vhd, Format::Vmdk] {
            let error = ContentError::Parent;
            let text = whole(&ImageError::Content { path: "/a".into(), format, error });
            assert!(!text.contains("-O qcow2") && text.contains("a new image of both"), "{text}");
        }
        let content = |format| {
            let error = ContentError::unsupported("x");
            whole(&ImageError::Content { path: "/a".into(), format, error })
        };
        for (format, word) in [(Format::Vhd, "-f vpc "), (Format::Qcow2, "-f qcow2 ")] {
            assert!(
                content(format).contains(word),
                "the format is not guessed: {}",
                content(format)
            );
        }
    }
}
