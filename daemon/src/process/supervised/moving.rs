//! The replacement of a process by one of another binary, in order.

use super::{Message, STOP_TIMEOUT, Session, Stage, Supervised};
use crate::process::child::{End, Process};
use crate::process::messages::{FromDevice, Start, ToDevice};
use crate::upgrade::progress::{Moving, Outcome, micros};
use pvio_xenbus::driver::Fault;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

/// A process that ends within this time after the request to stop has completed its requests: its
/// queues give up waiting for them only after 30 s.
const DRAINED_WITHIN: Duration = Duration::from_secs(20);

impl<S: Session> Supervised<S> {
    /// Handles that the process of an earlier supervisor is continued.
    pub(super) fn adopted(&mut self) {
        let upgrade = &self.environment.upgrade;
        // An upgrade that was interrupted is continued by a second one.
        if !upgrade.is_replacing() || self.pid().is_some_and(has_own_binary) {
            upgrade.finish(&self.device, Outcome::Adopted);
        } else if self.environment.records.is_some() && self.session.survives() {
            self.moving = Some(Moving::Waiting);
        } else {
            let why = "its data is in the memory of the process".into();
            upgrade.finish(&self.device, Outcome::Kept(why));
        }
    }

    /// Returns whether the process of the old binary has been stopped.
    pub(super) const fn is_moving(&self) -> bool {
        matches!(self.moving, Some(Moving::Begun { .. }))
    }

    /// Continues the replacement while a process runs. Returns whether it was requested to stop.
    pub(super) fn moves(&mut self, polled: Poll<()>) -> bool {
        if polled.is_pending() {
            return false;
        }
        match self.moving.take() {
            None => {
                // A process that was started instead of being adopted.
                self.environment.upgrade.finish(&self.device, Outcome::Moved { pause: 0 });
                false
            }
            Some(Moving::Begun { since, .. }) => {
                let (device, pause) = (&self.device, since.elapsed());
                tracing::info!(device, ?pause, "a process of the new binary serves");
                self.environment.upgrade.finish(device, Outcome::Moved { pause: micros(pause) });
                false
            }
            Some(Moving::Waiting) => {
                if !self.environment.upgrade.take_turn(&self.device, &self.wake) {
                    self.moving = Some(Moving::Waiting);
                    return false;
                }
                self.begin_to_move();
                true
            }
        }
    }

    fn begin_to_move(&mut self) {
        let Stage::Running(running) = std::mem::replace(&mut self.stage, Stage::Ended) else {
            return;
        };
        let old = File::open(format!("/proc/{}/exe", running.process.pid()));
        if let Err(error) = &old {
            let device = &self.device;
            tracing::warn!(device, %error, "the binary of the old process cannot be opened");
        }
        let since = Instant::now();
        self.moving = Some(Moving::Begun { since, old: old.ok().map(Arc::new) });
        stop::<S>(&running.process);
        self.stage = Stage::Stopping(running, since + STOP_TIMEOUT);
    }

    /// Waits until the old process has ended, and starts the new one.
    pub(super) fn poll_stopping(&mut self, on: &mut dyn FnMut(Message<S>)) -> Result<(), Fault> {
        let Stage::Stopping(running, until) = &self.stage else { return Ok(()) };
        while let Ok(Some((message, _))) = running.process.receive::<Message<S>>() {
            match message {
                FromDevice::Ready => {}
                // Its queues may have ended with requests in flight.
                FromDevice::Fault(_) => running.process.kill(),
                message => on(message),
            }
        }
        if !running.process.has_ended() {
            if Instant::now() >= *until {
                running.process.kill();
            }
            return Ok(());
        }
        let end = running.process.wait();
        let begun = *until - STOP_TIMEOUT;
        self.stage = Stage::Ended;
        if end == Some(End::Exited(0)) && begun.elapsed() < DRAINED_WITHIN {
            self.session.drained();
        }
        self.launch(Start::Resumed, Duration::ZERO, Some(Instant::now()))
    }

    /// Handles a process that did not begin to serve: one of the old binary is started if this one
    /// is of the new binary.
    pub(super) fn failed_to_start(&mut self, fault: Fault) -> Result<(), Fault> {
        let Some(Moving::Begun { old: Some(old), .. }) = self.moving.take() else {
            return Err(fault);
        };
        let device = &self.device;
        tracing::error!(device, %fault, "the new binary does not serve: the old one continues");
        self.binary = Some(old);
        let why = format!("the new binary does not serve: {fault}");
        self.environment.upgrade.finish(device, Outcome::Kept(why));
        self.launch(Start::Resumed, Duration::ZERO, Some(Instant::now()))
    }
}

/// Returns whether a process executes the file that this one does.
fn has_own_binary(pid: u32) -> bool {
    let file = |who: &str| std::fs::metadata(format!("/proc/{who}/exe"));
    let (Ok(own), Ok(other)) = (file("self"), file(&pid.to_string())) else { return false };
    (own.dev(), own.ino()) == (other.dev(), other.ino())
}

/// Lets a process complete its requests and end. One that does not read its messages is killed.
fn stop<S: Session>(process: &Process) {
    if process.send(&ToDevice::<S::Serve, S::Change>::Stop, &[]).is_err() {
        process.kill();
    }
}
