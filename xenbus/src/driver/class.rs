//! What only a class of backends knows.

use super::{Ends, Fault, HotplugMode};
use crate::handshake::HandshakeError;
use crate::handshake::common::{Hotplug, read_hotplug};
use crate::xenstore::Xenstore;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::task::Poll;

/// Whether what a device stands on is ready.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Prepared {
    /// It is.
    Yes,
    /// Something else has to happen first, which waits for the offer: the toolstack's hotplug
    /// script, or the release of an image that another device has still.
    AfterOffer,
    /// It is being prepared elsewhere, and nothing is offered before that is done. The class wakes
    /// its driver then.
    Pending,
}

/// How far the toolstack's hotplug script for a device has come. One that has none, or whose
/// [`HotplugMode`] run none, waits for nothing.
///
/// # Errors
/// A [`Fault`] with the reason the script gave.
pub fn hotplug(
    xs: &mut dyn Xenstore,
    ends: &Ends,
    script: Option<&[u8]>,
) -> Result<Prepared, Fault> {
    let Some(script) = script.filter(|_| ends.surroundings == HotplugMode::Scripts) else {
        return Ok(Prepared::Yes);
    };
    match read_hotplug(xs, &ends.back)? {
        None => Ok(Prepared::AfterOffer),
        Some(Hotplug::Connected) => Ok(Prepared::Yes),
        Some(Hotplug::Failed(why)) => {
            let script = String::from_utf8_lossy(script);
            Err(Fault::new("hotplug", format!("the hotplug script {script} failed: {why}")))
        }
    }
}

/// What only a class of backends knows.
pub trait BackendClass {
    /// Readies what the device stands on (an image, a tap), before the first offer. Called again
    /// until it says [`Prepared::Yes`]. It never waits: what takes time is done elsewhere.
    ///
    /// # Errors
    /// A [`Fault`] closes the device for good: it has to be removed and made anew.
    fn prepare(&mut self, xs: &mut dyn Xenstore, ends: &Ends) -> Result<Prepared, Fault>;

    /// Writes what the backend offers, as far as it is known before the device is prepared. Part
    /// of a transaction, so it may run more than once.
    ///
    /// # Errors
    /// A [`HandshakeError`], as for [`prepare`](Self::prepare).
    fn offer(&self, xs: &mut dyn Xenstore, ends: &Ends) -> Result<(), HandshakeError>;

    /// Makes sure that no later process resumes a session of an earlier one: a new session may begin, and
    /// its frontend may use the same grants and event channels.
    fn forget_session(&mut self, _ends: &Ends) {}

    /// Whether the session of an earlier process can go on. Asked before
    /// [`connect`](Self::connect) with [`Ends::resumed`].
    ///
    /// # Errors
    /// Why not: the frontend has to start over, unless it [was not served](Ends::was_unserved).
    fn resumable(&mut self, _xs: &mut dyn Xenstore, _ends: &Ends) -> Result<(), Fault> {
        Ok(())
    }

    /// Reads what the frontend asks for, maps its rings and begins to serve. Called again, and the
    /// driver woken, for as long as it is pending; or [`disconnect`](Self::disconnect) is, if the
    /// frontend leaves meanwhile.
    ///
    /// # Errors
    /// A [`Fault`] closes the device until the frontend starts anew; `disconnect` follows.
    fn connect(&mut self, xs: &mut dyn Xenstore, ends: &Ends) -> Result<Poll<()>, Fault>;

    /// Writes what is served (a disk's size), with state Connected. Part of a transaction.
    ///
    /// # Errors
    /// A [`HandshakeError`], as for [`connect`](Self::connect).
    fn describe(&self, xs: &mut dyn Xenstore, ends: &Ends) -> Result<(), HandshakeError>;

    /// Reads again what the toolstack may change while the device is served (a vif's `rate`, a
    /// disk's limits, the medium in a drive).
    ///
    /// # Errors
    /// A [`Fault`]; what was read before stays in force, unless the next
    /// [`fault`](Self::fault) says otherwise.
    fn refresh(&mut self, _xs: &mut dyn Xenstore, _ends: &Ends) -> Result<(), Fault> {
        Ok(())
    }

    /// Paths to be watched while the device is served, besides both ends' states: what the frontend may
    /// change at any time.
    fn watches(&self, _ends: &Ends) -> Vec<String> {
        Vec::new()
    }

    /// Reads again what stands at the watched paths. Called whenever anything may have changed.
    ///
    /// # Errors
    /// A [`HandshakeError`] closes the device until the frontend starts anew.
    fn reread_keys(&mut self, _xs: &mut dyn Xenstore, _ends: &Ends) -> Result<(), HandshakeError> {
        Ok(())
    }

    /// Whether such devices follow a frontend through Reconfiguring; others overlook it.
    fn reconfigures(&self) -> bool {
        false
    }

    /// Reads again what the frontend changes by Reconfiguring.
    ///
    /// # Errors
    /// A [`Fault`] closes the device until the frontend starts anew.
    fn reconfigure(&mut self, _xs: &mut dyn Xenstore, _ends: &Ends) -> Result<(), Fault> {
        Ok(())
    }

    /// Looks whether what the device stands on has changed by itself (a disk's image has grown), and
    /// tells the frontend. Called now and then, and cheap.
    ///
    /// # Errors
    /// A [`HandshakeError`]: the frontend could not be told.
    fn look(&mut self, _xs: &mut dyn Xenstore, _ends: &Ends) -> Result<(), HandshakeError> {
        Ok(())
    }

    /// Whether the frontend, which is Initialised or Connected, asks for something else than what
    /// it was [connected](Self::connect) to: then it has started anew (kexec) and its states before
    /// that went unseen.
    fn is_superseded(&mut self, _xs: &mut dyn Xenstore, _ends: &Ends) -> bool {
        false
    }

    /// Goes on with what was begun and is done elsewhere (a change of media). Called on every
    /// step that finds nothing else to do.
    ///
    /// # Errors
    /// A [`Fault`] is written to the `error` node; the device goes on.
    fn proceed(&mut self, _xs: &mut dyn Xenstore, _ends: &Ends) -> Result<(), Fault> {
        Ok(())
    }

    /// Stops serving, finishes what was begun, and gives back all that is the frontend's. It never
    /// waits: it is called again, and the driver woken, until it is ready. May be called when
    /// nothing is served.
    fn disconnect(&mut self) -> Poll<()>;

    /// As [`disconnect`](Self::disconnect), and keeps what another process needs to take the session
    /// over.
    fn leave(&mut self) -> Poll<()> {
        self.disconnect()
    }

    /// Closes what [`prepare`](Self::prepare) opened: the device is about to be dropped, and
    /// nothing is served. As [`disconnect`](Self::disconnect), it never waits.
    fn release(&mut self) -> Poll<()> {
        Poll::Ready(())
    }

    /// Why serving ended by itself, if it did; told once.
    fn fault(&mut self) -> Option<Fault>;

    /// What the operator must know of a device that is served all the same; told once.
    fn warning(&mut self) -> Option<Fault> {
        None
    }
}
