//! The interface of a class of backends.

use super::{BackendContext, Fault, HotplugMode};
use crate::handshake::HandshakeError;
use crate::handshake::common::{Hotplug, read_hotplug};
use crate::xenstore::Xenstore;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::task::Poll;

/// Whether the storage or interface of a device is ready.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Prepared {
    /// It is ready.
    Yes,
    /// Something else must happen after the offer is written: the toolstack's hotplug script must
    /// run, or another device must release the image.
    AfterOffer,
    /// It is being prepared asynchronously; no offer is written before that is done. The class
    /// wakes its driver when it is.
    Pending,
}

/// Returns the status of the toolstack's hotplug script for a device. A device without a script, or
/// with a [`HotplugMode`] that runs none, does not wait.
///
/// # Errors
/// A [`Fault`] with the script's reason.
pub fn hotplug(
    xs: &mut dyn Xenstore,
    context: &BackendContext,
    script: Option<&[u8]>,
) -> Result<Prepared, Fault> {
    let Some(script) = script.filter(|_| context.hotplug_mode == HotplugMode::Scripts) else {
        return Ok(Prepared::Yes);
    };
    match read_hotplug(xs, &context.back)? {
        None => Ok(Prepared::AfterOffer),
        Some(Hotplug::Connected) => Ok(Prepared::Yes),
        Some(Hotplug::Failed(why)) => {
            let script = String::from_utf8_lossy(script);
            Err(Fault::new("hotplug", format!("the hotplug script {script} failed: {why}")))
        }
    }
}

/// The part of a backend that depends on the class of the device.
pub trait BackendClass {
    /// Prepares the storage or interface of the device (an image, a tap), before the first offer.
    /// Called again until it returns [`Prepared::Yes`]. It must not block: slow operations are done
    /// asynchronously.
    ///
    /// # Errors
    /// A [`Fault`] closes the device permanently: it has to be removed and created again.
    fn prepare(
        &mut self,
        xs: &mut dyn Xenstore,
        context: &BackendContext,
    ) -> Result<Prepared, Fault>;

    /// Writes the offer, as far as it is known before the device is prepared. Runs in a
    /// transaction, so it may be repeated.
    ///
    /// # Errors
    /// A [`HandshakeError`], as for [`prepare`](Self::prepare).
    fn offer(&self, xs: &mut dyn Xenstore, context: &BackendContext) -> Result<(), HandshakeError>;

    /// Makes sure that no later process resumes a session of an earlier one: a new session may
    /// start, and its frontend may use the same grants and event channels.
    fn forget_session(&mut self, _context: &BackendContext) {}

    /// Returns whether the session of an earlier process can continue. Called before
    /// [`connect`](Self::connect) with [`BackendContext::resumed`].
    ///
    /// # Errors
    /// The reason why not: the frontend must reconnect, unless it [was not
    /// served](BackendContext::was_unserved).
    fn resumable(
        &mut self,
        _xs: &mut dyn Xenstore,
        _context: &BackendContext,
    ) -> Result<(), Fault> {
        Ok(())
    }

    /// Reads the frontend's request, maps its rings and starts to serve. While it returns pending,
    /// the class wakes the driver and this is called again; or [`disconnect`](Self::disconnect) is
    /// called, if the frontend leaves first.
    ///
    /// # Errors
    /// A [`Fault`] closes the device until the frontend restarts; `disconnect` follows.
    fn connect(
        &mut self,
        xs: &mut dyn Xenstore,
        context: &BackendContext,
    ) -> Result<Poll<()>, Fault>;

    /// Writes the device's properties (a disk's size), with state Connected. Runs in a transaction.
    ///
    /// # Errors
    /// A [`HandshakeError`], as for [`connect`](Self::connect).
    fn describe(
        &self,
        xs: &mut dyn Xenstore,
        context: &BackendContext,
    ) -> Result<(), HandshakeError>;

    /// Reads the keys that the toolstack may change while the device is connected (a vif's `rate`,
    /// a disk's limits, the media in a drive).
    ///
    /// # Errors
    /// A [`Fault`]; the previous settings stay in effect, unless the next [`fault`](Self::fault)
    /// reports otherwise.
    fn refresh(&mut self, _xs: &mut dyn Xenstore, _context: &BackendContext) -> Result<(), Fault> {
        Ok(())
    }

    /// Returns the paths to watch while the device is connected, besides the states: keys that the
    /// frontend may change at any time.
    fn watches(&self, _context: &BackendContext) -> Vec<String> {
        Vec::new()
    }

    /// Reads the watched paths again. Called whenever any of them may have changed.
    ///
    /// # Errors
    /// A [`HandshakeError`] closes the device until the frontend restarts.
    fn reread_keys(
        &mut self,
        _xs: &mut dyn Xenstore,
        _context: &BackendContext,
    ) -> Result<(), HandshakeError> {
        Ok(())
    }

    /// Returns whether devices of this class support Reconfiguring; others ignore it.
    fn reconfigures(&self) -> bool {
        false
    }

    /// Reads the keys that the frontend changes by Reconfiguring.
    ///
    /// # Errors
    /// A [`Fault`] closes the device until the frontend restarts.
    fn reconfigure(
        &mut self,
        _xs: &mut dyn Xenstore,
        _context: &BackendContext,
    ) -> Result<(), Fault> {
        Ok(())
    }

    /// Checks whether the device's storage or interface has changed (a disk's image has grown), and
    /// notifies the frontend. Called periodically; must be cheap.
    ///
    /// # Errors
    /// A [`HandshakeError`]: the frontend could not be notified.
    fn check_for_changes(
        &mut self,
        _xs: &mut dyn Xenstore,
        _context: &BackendContext,
    ) -> Result<(), HandshakeError> {
        Ok(())
    }

    /// Returns whether the frontend, which is Initialised or Connected, requests something other
    /// than it was [connected](Self::connect) to: then it has restarted (kexec) and its states
    /// before that were not seen.
    fn is_superseded(&mut self, _xs: &mut dyn Xenstore, _context: &BackendContext) -> bool {
        false
    }

    /// Continues asynchronous operations (a change of media). Called on every step that has nothing
    /// else to do.
    ///
    /// # Errors
    /// A [`Fault`] is written to the `error` node; the device continues to be served.
    fn proceed(&mut self, _xs: &mut dyn Xenstore, _context: &BackendContext) -> Result<(), Fault> {
        Ok(())
    }

    /// Stops serving, completes the requests in flight, and releases all memory of the frontend. It
    /// must not block: until it returns ready, the class wakes the driver and this is called again.
    /// May be called if nothing is served.
    fn disconnect(&mut self) -> Poll<()>;

    /// Stops as [`disconnect`](Self::disconnect) does, and preserves what another process needs to
    /// take the session over.
    fn leave(&mut self) -> Poll<()> {
        self.disconnect()
    }

    /// Closes what [`prepare`](Self::prepare) opened: the device is about to be dropped, and
    /// nothing is served. It must not block, as [`disconnect`](Self::disconnect).
    fn release(&mut self) -> Poll<()> {
        Poll::Ready(())
    }

    /// Returns the reason why serving stopped without a request to stop, if it did; each is
    /// returned once.
    fn fault(&mut self) -> Option<Fault>;

    /// Returns a fault that the operator must know although the device is still served; each is
    /// returned once.
    fn warning(&mut self) -> Option<Fault> {
        None
    }
}
