//! The connection to xenstore, which outlives the server.

use pvio_xenbus::client::Client;
use pvio_xenbus::wire::Op;
use pvio_xenbus::{WatchEvent, Xenstore, XsError};
use std::collections::BTreeSet;
use std::fmt::Display;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

/// Time from the loss of a connection to the first attempt to connect again, and the maximum time
/// between two attempts.
const FIRST_WAIT: Duration = Duration::from_millis(50);
const LAST_WAIT: Duration = Duration::from_secs(2);

type Connect<'a> = Box<dyn FnMut() -> Result<Client, String> + 'a>;

/// A connection to xenstore that can be made again when it is lost. In the meantime every request
/// fails with [`XsError::Closed`].
pub struct XenstoreLink<'a> {
    client: Client,
    connect: Option<Connect<'a>>,
    /// Paths and tokens of the watches.
    watches: BTreeSet<(String, String)>,
    lost: Option<Lost>,
}

struct Lost {
    since: Instant,
    next: Instant,
    wait: Duration,
}

impl<'a> XenstoreLink<'a> {
    /// Uses a connection whose loss is final.
    #[must_use]
    pub fn fixed(client: Client) -> Self {
        Self { client, connect: None, watches: BTreeSet::new(), lost: None }
    }

    /// Uses a connection that `connect` makes again.
    #[must_use]
    pub fn reconnecting<E: Display>(
        client: Client,
        mut connect: impl FnMut() -> Result<Client, E> + 'a,
    ) -> Self {
        let connect: Connect<'a> = Box::new(move || connect().map_err(|error| error.to_string()));
        Self { connect: Some(connect), ..Self::fixed(client) }
    }

    /// Returns whether the connection is lost, and can be made again.
    pub(super) const fn is_lost(&self) -> bool {
        self.lost.is_some()
    }

    /// Returns the time until the next attempt to connect.
    pub(super) fn wait(&self) -> Option<Duration> {
        self.lost.as_ref().map(|lost| lost.next.saturating_duration_since(Instant::now()))
    }

    /// Connects again if it is time to, and registers all watches again, each of which causes an
    /// event. Returns whether there is a connection.
    pub(super) fn reconnect(&mut self) -> bool {
        let Some(lost) = &mut self.lost else { return true };
        let Some(connect) = &mut self.connect else { return false };
        if Instant::now() < lost.next {
            return false;
        }
        let connected = connect().and_then(|mut client| {
            for (path, token) in &self.watches {
                match client.watch(path, token) {
                    Err(error) if error.is_connection_lost() => return Err(error.to_string()),
                    // The node may be gone.
                    _ => {}
                }
            }
            Ok(client)
        });
        match connected {
            Ok(client) => {
                let (time, watches) = (lost.since.elapsed(), self.watches.len());
                tracing::info!(?time, watches, "connected to xenstore again");
                (self.client, self.lost) = (client, None);
                true
            }
            Err(error) => {
                tracing::debug!(error, "no connection to xenstore");
                lost.wait = (lost.wait * 2).min(LAST_WAIT);
                lost.next = Instant::now() + lost.wait;
                false
            }
        }
    }

    fn checked<T>(
        &mut self,
        call: impl FnOnce(&mut Client) -> Result<T, XsError>,
    ) -> Result<T, XsError> {
        if self.lost.is_some() {
            return Err(XsError::Closed);
        }
        let result = call(&mut self.client);
        if let Err(error) = &result
            && error.is_connection_lost()
            && self.connect.is_some()
        {
            let remedy = "check that xenstored is running";
            tracing::warn!(%error, remedy, "the connection to xenstore is lost: devices are served without it");
            let since = Instant::now();
            self.lost = Some(Lost { since, next: since + FIRST_WAIT, wait: FIRST_WAIT });
        }
        result
    }
}

impl AsFd for XenstoreLink<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.client.as_fd()
    }
}

impl Xenstore for XenstoreLink<'_> {
    fn request(&mut self, op: Op, tx_id: u32, parts: &[&[u8]]) -> Result<Vec<u8>, XsError> {
        self.checked(|client| client.request(op, tx_id, parts))
    }

    fn poll_event(&mut self) -> Result<Option<WatchEvent>, XsError> {
        self.checked(Client::poll_event)
    }

    fn wait_event(&mut self, timeout: Option<Duration>) -> Result<Option<WatchEvent>, XsError> {
        self.checked(|client| client.wait_event(timeout))
    }

    fn watch(&mut self, path: &str, token: &str) -> Result<(), XsError> {
        self.checked(|client| client.watch(path, token))?;
        self.watches.insert((path.into(), token.into()));
        Ok(())
    }

    fn unwatch(&mut self, path: &str, token: &str) -> Result<(), XsError> {
        self.watches.remove(&(path.into(), token.into()));
        self.checked(|client| client.unwatch(path, token))
    }
}
