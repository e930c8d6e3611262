//! The image helper: a process that finds out what a disk consists of.
//!
//! It gets the files that the operator names, opens those that their headers name, below the image
//! roots, validates all of them, and returns the descriptors with a description. It parses images,
//! so it has no rights beyond that, and lives for one disk.

#[cfg(fuzzing)]
pub mod fuzz;

use super::channel::{Channel, ChannelError};
use super::child::{End, Process, Program, wait_message};
use super::confine::{Confined, Confinement};
use super::faults::reported;
use super::supervised::AT_ONCE;
use crate::failure::Failure;
use pvio_confinement::{ProcessKind, SystemCalls};
use pvio_ring::error::Report;
use pvio_storage::host::OpenFailure;
use pvio_storage::image::{
    Disk, DiskDescription, Format, HandedFiles, HandedRecord, Resolved, Spec, image_roots, resolve,
};
use pvio_xenbus::driver::Fault;
use serde::{Deserialize, Serialize};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

/// How long the helper may take. Storage that does not respond is also waited for by the opening of
/// the disk, which has a deadline of its own.
const TIMEOUT: Duration = Duration::from_secs(60);
/// Maximum number of helpers for one disk that end without an answer, beside the last one.
const MAX_DEATHS: u32 = 2;
/// Maximum number of files that a definition names: each layer of overlays has one, or two.
const MAX_NAMED: usize = 64;
/// The hidden command that runs the helper.
pub const COMMAND: &str = "image-helper";

/// What the helper is asked, after the records of its descriptors.
#[derive(Debug, Serialize, Deserialize)]
struct Request {
    disk: Disk,
    confined: Confined,
}

#[derive(Debug, Serialize, Deserialize)]
enum Message<T> {
    /// The records of the descriptors beside this message.
    Files(Vec<HandedRecord>),
    /// Everything else.
    Done(T),
}

#[derive(Debug, Serialize, Deserialize)]
enum Answer {
    Resolved(DiskDescription),
    Failed { fault: Fault, busy: bool },
}

/// Starts a helper and lets it find out what a disk consists of, beyond the files that were opened
/// already. Blocks.
///
/// # Errors
/// The image cannot be used, or the helper failed.
pub fn resolve_confined(
    program: &Program,
    confinement: &Confinement,
    disk: &Disk,
    named: &HandedFiles,
) -> Result<Resolved, OpenFailure> {
    let roots = image_roots(disk, named)?;
    let confined = confinement.of_helper(roots, writes_several_files(disk));
    let mut deaths = 0;
    let answer = loop {
        match resolve_once(program, &confined, disk, named) {
            Err(Lost { error, end: Some(end) }) if deaths < MAX_DEATHS => {
                let error = Report(&error).to_string();
                tracing::warn!(%end, error, "the image helper ended: it is started again");
                deaths += 1;
            }
            Err(Lost { error, end }) => {
                let end = end.map_or_else(String::new, |end| format!(" ({end})"));
                return Err(failed(format!("the image helper failed{end}: {}", Report(&error))));
            }
            Ok(answer) => break answer,
        }
    };
    let (answer, files) = answer;
    resolved(disk, answer, files)
}

/// Returns the disk as a helper describes it.
fn resolved(disk: &Disk, answer: Answer, files: Files) -> Result<Resolved, OpenFailure> {
    match answer {
        Answer::Failed { fault, busy } => Err(OpenFailure { fault: reported(fault), busy }),
        Answer::Resolved(mut description) => {
            let (records, descriptors) = files.into_iter().unzip();
            description.files = records;
            Resolved::new(disk, description, descriptors)
                .map_err(|e| failed(format!("the image helper's answer is invalid: {e}")))
        }
    }
}

/// A helper that did not answer.
struct Lost {
    error: ChannelError,
    /// How it ended, if it ended by itself.
    end: Option<End>,
}

/// Starts a helper, and ends it after its answer.
fn resolve_once(
    program: &Program,
    confined: &Confined,
    disk: &Disk,
    named: &HandedFiles,
) -> Result<(Answer, Files), Lost> {
    let process = Process::spawn(program, "pvio: image helper", false)
        .map_err(|error| Lost { error: ChannelError::Io(error), end: None })?;
    let asked = ask(&process, Request { disk: disk.clone(), confined: confined.clone() }, named);
    // One that has closed its connection is ending.
    let is_ending = matches!(asked, Err(ChannelError::Closed)) || process.has_ended();
    process.kill();
    let end = process.wait().filter(|_| is_ending);
    asked.map_err(|error| Lost { error, end })
}

/// Returns whether files that the image's header names are written.
fn writes_several_files(disk: &Disk) -> bool {
    let is_vmdk = matches!(disk.spec, Spec::File { format: Format::Vmdk, .. });
    is_vmdk && disk.options.read_only != Some(true)
}

fn failed(text: String) -> OpenFailure {
    let fault = Fault::new("image-helper", text);
    let remedy = "check the image with qemu-img check; if it is valid, report this";
    OpenFailure { fault: fault.with_remedy(remedy), busy: false }
}

type Files = Vec<(HandedRecord, OwnedFd)>;

fn ask(
    process: &Process,
    request: Request,
    named: &HandedFiles,
) -> Result<(Answer, Files), ChannelError> {
    send(|message, fds| process.send(message, fds), named, request)?;
    receive(Resolved::MAX_FILES, within(TIMEOUT, |left| process.wait_message(left)))
}

/// Returns a function that receives messages, all of them in this time.
fn within<T>(time: Duration, receive: impl Fn(Duration) -> T) -> impl Fn() -> T {
    let until = Instant::now() + time;
    move || receive(until.saturating_duration_since(Instant::now()))
}

/// Sends descriptors and what belongs to them.
fn send<T: Serialize>(
    send: impl Fn(&Message<T>, &[BorrowedFd<'_>]) -> Result<(), ChannelError>,
    files: &HandedFiles,
    last: T,
) -> Result<(), ChannelError> {
    let descriptors: Vec<BorrowedFd<'_>> = files.descriptors().collect();
    let records = files.records();
    for (records, descriptors) in records.chunks(AT_ONCE).zip(descriptors.chunks(AT_ONCE)) {
        send(&Message::Files(records.to_vec()), descriptors)?;
    }
    send(&Message::Done(last), &[])
}

/// Receives at most `most` descriptors with what belongs to them. A helper that was taken over by an
/// image may send any number, which would exhaust those of the supervisor.
fn receive<T>(
    most: usize,
    receive: impl Fn() -> Result<(Message<T>, Vec<OwnedFd>), ChannelError>,
) -> Result<(T, Files), ChannelError> {
    let mut files = Files::new();
    loop {
        match receive()? {
            (Message::Files(records), descriptors) => {
                if records.is_empty() || records.len() != descriptors.len() {
                    let error = "each descriptor has one record";
                    return Err(ChannelError::Invalid(serde::de::Error::custom(error)));
                }
                if records.len() > most - files.len() {
                    return Err(ChannelError::TooLong);
                }
                files.extend(records.into_iter().zip(descriptors));
            }
            (Message::Done(last), _) => return Ok((last, files)),
        }
    }
}

/// Runs the helper: answers one request.
///
/// # Errors
/// The supervisor does not respond.
pub fn run(channel: &Channel) -> Result<(), Failure> {
    let (request, files) =
        receive::<Request>(MAX_NAMED, within(TIMEOUT, |left| wait_message(channel, left)))
            .map_err(Failure::foreign)?;
    let Request { disk, confined } = request;
    let mut applied = confined.layers.apply().map_err(Failure::foreign)?;
    SystemCalls::of(ProcessKind::ImageHelper).install(confined.enforcement, &mut applied);
    for (layer, missing) in applied.failed() {
        let (reason, detail) = (missing.reason, &missing.detail);
        tracing::debug!(%layer, ?reason, detail, "the image helper lacks a layer of its confinement");
    }
    let (records, descriptors) = files.into_iter().unzip();
    let found = HandedFiles::new(records, descriptors).map_err(Failure::foreign)?;
    let (files, answer) = match resolve(&disk, &found) {
        Ok(resolved) => {
            // The records travel with the descriptors.
            let description = DiskDescription { files: Vec::new(), ..resolved.description() };
            (resolved.files, Answer::Resolved(description))
        }
        Err(error) => {
            let OpenFailure { fault, busy } = error.into();
            (HandedFiles::default(), Answer::Failed { fault, busy })
        }
    };
    send(|message, fds| channel.send(message, fds), &files, answer).map_err(Failure::foreign)?;
    // The descriptors are in flight as long as the supervisor has not received them.
    let _ = wait_message::<()>(channel, TIMEOUT);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_arrive_with_their_records_in_order() {
        let (one, other) = Channel::pair().unwrap();
        let pairs = (0..3 * AT_ONCE).map(|_| {
            let (reader, _) = rustix::pipe::pipe().unwrap();
            (HandedRecord::Scratch, reader)
        });
        let (records, descriptors): (Vec<_>, Vec<_>) = pairs.unzip();
        let files = HandedFiles::new(records, descriptors).unwrap();
        send(|message, fds| one.send(message, fds), &files, 7_u32).unwrap();
        let (last, files) = receive::<u32>(64, || wait_message(&other, TIMEOUT)).unwrap();
        assert_eq!((last, files.len()), (7, 3 * AT_ONCE));
    }

    /// What the supervisor receives if a helper sends the same message without end.
    fn received(records: usize, descriptors: usize) -> (ChannelError, u32) {
        let received = std::cell::Cell::new(0);
        let one = || {
            received.set(received.get() + 1);
            assert!(received.get() < 100, "messages are received without end");
            let descriptors = (0..descriptors).map(|_| rustix::pipe::pipe().unwrap().0).collect();
            Ok((Message::Files(vec![HandedRecord::Scratch; records]), descriptors))
        };
        (receive::<u32>(20, one).unwrap_err(), received.get())
    }

    #[test]
    fn helper_that_sends_descriptors_without_end_is_rejected() {
        let (error, messages) = received(8, 8);
        assert!(matches!(error, ChannelError::TooLong) && messages == 3, "{messages}: {error:?}");
    }

    #[test]
    fn descriptors_without_records_and_records_without_descriptors_are_rejected() {
        for (records, descriptors) in [(0, 0), (1, 0), (0, 1), (8, 7)] {
            let (error, messages) = received(records, descriptors);
            assert!(matches!(error, ChannelError::Invalid(_)) && messages == 1, "{error:?}");
        }
    }

    #[test]
    fn helper_that_sends_messages_slowly_has_one_deadline() {
        let left = within(Duration::from_millis(20), |left| left);
        std::thread::sleep(Duration::from_millis(30));
        assert_eq!(left(), Duration::ZERO);
    }

    #[test]
    fn helper_that_cannot_run_is_an_error_with_its_end() {
        let program = Program { path: "/bin/false".into(), args: Vec::new() };
        let disk: Disk = "ram:1M".parse().unwrap();
        let named = HandedFiles::default();
        let failure = resolve_confined(&program, &Confinement::default(), &disk, &named);
        let OpenFailure { fault, busy } = failure.unwrap_err();
        assert!(
            (&*fault.code, busy) == ("image-helper", false) && fault.text.contains("exit code 1")
        );
    }
}
