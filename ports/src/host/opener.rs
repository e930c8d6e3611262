//! Opening and closing of a vif's link as the toolstack configures it.
#![forbid(unsafe_code)]

use super::config::{NicConfig, NicSettings, bridge_and_options, interface_name};
use super::link::{Link, LinkDescription, LinkParams, TapEvents};
use super::opening::{self, Opening};
use super::queues::OpenLink;
use crate::afxdp::{AfXdpError, InterfacePlace};
use crate::options::{LinkSpec, NicOptions};
use crate::settings::{RuntimeSettings, WrapperSettings};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::task::Poll;
use pvio_netback::queue::{Policy, Waker};
use pvio_netback::vif::Attach;
use pvio_runtime::{LogLimit, Task};
use pvio_xenbus::driver::Fault;
use pvio_xenbus::handshake::vif::{MAX_QUEUES, ToolstackBack};
use std::os::fd::OwnedFd;

/// Opens and closes the link of a vif that [its options](NicOptions) select, and applies changed
/// options. This is the part of a vif that needs capabilities, network namespaces and files;
/// [`LinkQueues`](super::LinkQueues) is the other one.
pub struct LinkOpener {
    config: NicConfig,
    wake: Waker,
    max_queues: u32,
    /// Number of queues of a session that an earlier process started.
    resumed_queues: u32,
    link: Option<OpenLink>,
    /// Options with which the link was opened.
    options: NicOptions,
    /// The link that is being opened, and its options.
    opening: Option<(Opening, NicOptions)>,
    closing: Option<Task<()>>,
    shared: Arc<NicSettings>,
    settings: Arc<RuntimeSettings>,
    /// Settings that were applied last.
    applied: WrapperSettings,
    tap_events: TapEvents,
}

impl LinkOpener {
    /// Returns an opener without a link. `wake` may be called by any thread, when the link is open
    /// or closed. The driver must be stepped then.
    #[must_use]
    pub fn new(config: NicConfig, wake: Waker) -> Self {
        Self {
            max_queues: config.queues(),
            config,
            wake,
            resumed_queues: 0,
            link: None,
            options: NicOptions::default(),
            opening: None,
            closing: None,
            shared: Arc::default(),
            settings: Arc::default(),
            applied: WrapperSettings::default(),
            tap_events: TapEvents::default(),
        }
    }

    /// Sets the settings that all vifs of a driver domain share.
    #[must_use]
    pub fn within(self, shared: Arc<NicSettings>) -> Self {
        Self { shared, ..self }
    }

    /// Returns the counters of rate-limited log lines, by name.
    pub fn events(&self) -> Vec<(&'static str, Arc<LogLimit>)> {
        let mut events = Vec::from(self.tap_events.named());
        events.extend(self.link.as_ref().and_then(|link| link.lock().event()));
        events
    }

    /// Returns the open link.
    #[must_use]
    pub const fn link(&self) -> Option<&OpenLink> {
        self.link.as_ref()
    }

    /// Returns the settings that can be changed, and the capture point, while the vif runs in this
    /// process.
    #[must_use]
    pub const fn settings(&self) -> &Arc<RuntimeSettings> {
        &self.settings
    }

    /// Returns the settings that were applied last, for another process in which the vif runs.
    #[must_use]
    pub const fn applied(&self) -> &WrapperSettings {
        &self.applied
    }

    /// Returns how the guest's pages are accessed.
    #[must_use]
    pub const fn policy(&self) -> Policy {
        self.config.policy
    }

    /// Returns the largest number of queues of a vif.
    #[must_use]
    pub fn max_queues(&self) -> u32 {
        let limit = self.link.as_ref().and_then(|link| link.lock().max_queues());
        limit.map_or(self.max_queues, |limit| limit.min(self.max_queues))
    }

    /// Returns why a vif of these options must be served by the process that opens its link; `None`
    /// if another process can serve it.
    ///
    /// # Errors
    /// A [`Fault`] if an option is invalid.
    pub fn bound_to_process(&self, vif: &ToolstackBack) -> Result<Option<&'static str>, Fault> {
        let options = self.options_of(vif)?;
        Ok(match options.link {
            LinkSpec::Switch(_) => Some("the members of its switch share memory"),
            _ => options.share.is_some().then_some("it shares a rate with other NICs"),
        })
    }

    /// Uses the link that the process of an earlier opener has, which opened it with the options of
    /// `applied`. Returns whether these options select the same link; if not, nothing is changed.
    ///
    /// # Errors
    /// A [`Fault`] if an option is invalid or the descriptors are not those of the description.
    pub fn adopt(
        &mut self,
        vif: &ToolstackBack,
        applied: &WrapperSettings,
        description: &LinkDescription,
        descriptors: Vec<OwnedFd>,
    ) -> Result<bool, Fault> {
        let options = self.options_of(vif)?;
        if !options.has_link_of(&applied.options) {
            return Ok(false);
        }
        if let LinkDescription::AfXdp { place, .. } = description
            && !is_place(place, &options)?
        {
            return Ok(false);
        }
        let link = OpenLink::from_descriptors(description, descriptors)?;
        self.apply(vif, options.clone())?;
        if let LinkDescription::Tap { queues, .. } = description {
            // No more are open.
            self.max_queues = self.max_queues.min(u32::try_from(*queues).unwrap_or(u32::MAX));
        }
        (self.link, self.options) = (Some(link), options);
        Ok(true)
    }

    /// Announces the number of queues of a session that is about to be resumed.
    pub fn expect_queues(&mut self, queues: usize) {
        self.resumed_queues = u32::try_from(queues).unwrap_or(u32::MAX).min(MAX_QUEUES);
    }

    /// Opens the link. Blocks.
    ///
    /// # Errors
    /// A [`Fault`] that describes the remedy to the operator.
    pub fn open(&mut self, vif: &ToolstackBack, attach: Attach) -> Result<(), Fault> {
        let (mut opening, options) = self.begin_opening(vif, attach)?;
        (self.link, self.options) = (Some(OpenLink::new(opening.wait()?)), options);
        Ok(())
    }

    /// Opens the link without blocking. Called again until it is ready.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn poll_open(&mut self, vif: &ToolstackBack, attach: Attach) -> Result<Poll<()>, Fault> {
        let (mut opening, options) = match self.opening.take() {
            Some(opening) => opening,
            None => self.begin_opening(vif, attach)?,
        };
        match opening.poll() {
            Poll::Ready(link) => {
                (self.link, self.options) = (Some(OpenLink::new(link?)), options);
                Ok(Poll::Ready(()))
            }
            Poll::Pending => {
                self.opening = Some((opening, options));
                Ok(Poll::Pending)
            }
        }
    }

    /// Closes the link. Called again until it is ready.
    pub fn close(&mut self) -> Poll<()> {
        self.opening = None;
        self.options = NicOptions::default();
        if let Some(link) = self.link.take() {
            self.closing = opening::close(link, Arc::clone(&self.wake));
        }
        if self.closing.as_mut().is_some_and(|closing| closing.poll().is_pending()) {
            return Poll::Pending;
        }
        self.closing = None;
        Poll::Ready(())
    }

    /// Applies changed options of the toolstack, as far as they may change while the vif runs.
    ///
    /// # Errors
    /// A [`Fault`]; the previous options stay in force.
    pub fn refresh(&mut self, vif: &ToolstackBack) -> Result<(), Fault> {
        let options = self.options_of(vif)?;
        if !options.has_link_of(&self.options) {
            let why = "a NIC's port, bridge and namespace cannot be changed while it is attached";
            let remedy = "detach the NIC and attach it with other options";
            return Err(Fault::new("nic-options", why).with_remedy(remedy));
        }
        self.apply(vif, options)
    }

    /// Returns the options of a vif from all sources: defaults, `bridge` and `options` keys.
    fn options_of(&self, vif: &ToolstackBack) -> Result<NicOptions, Fault> {
        let (_, options) = bridge_and_options(vif);
        let all = self.shared.defaults.clone().and(&options.replace(';', ","))?;
        Ok(all.and(vif.options.as_deref().unwrap_or_default())?)
    }

    fn apply(&mut self, vif: &ToolstackBack, options: NicOptions) -> Result<(), Fault> {
        let wrappers = WrapperSettings { options, mac: vif.mac.0, addresses: vif.ip.clone() };
        self.settings.apply(&wrappers, &self.shared.shares)?;
        self.applied = wrappers;
        Ok(())
    }

    /// Starts to open the vif's link.
    fn begin_opening(
        &mut self,
        vif: &ToolstackBack,
        attach: Attach,
    ) -> Result<(Opening, NicOptions), Fault> {
        let options = self.options_of(vif)?;
        self.apply(vif, options.clone())?;
        let name = interface_name(vif);
        let params = LinkParams {
            name: name.clone(),
            vif: vif.clone(),
            attach,
            config: self.config.clone(),
            options: options.clone(),
            settings: Arc::clone(&self.shared),
            queues: self.max_queues.max(self.resumed_queues),
            tap_events: self.tap_events.clone(),
        };
        let opening = Opening::begin(&name, move || Link::open(&params), Arc::clone(&self.wake))?;
        Ok((opening, options))
    }
}

/// Returns whether this is the place of the interface that the options select. The process that
/// describes it is not trusted with the choice of an interface and of a namespace.
fn is_place(place: &InterfacePlace, options: &NicOptions) -> Result<bool, Fault> {
    let LinkSpec::AfXdp(name) = &options.link else { return Ok(false) };
    match InterfacePlace::find(name, options.netns.as_deref()) {
        Ok(found) => Ok(found == *place),
        Err(AfXdpError::NoInterface(_)) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

impl fmt::Debug for LinkOpener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LinkOpener")
            .field("config", &self.config)
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}
