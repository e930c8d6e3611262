//! Requests that only dom0 may make.

use alloc::format;

use pvio_ring::DomId;

use crate::response::{Response, ok, text};
use crate::store::Store;
use pvio_xenbus::wire::{XsErrno, parse_u16, strings};

impl Store {
    pub(crate) fn introduce_request(&mut self, payload: &[u8]) -> Response {
        let mut args = strings(payload);
        let domid = args.next().and_then(real_guest).ok_or(XsErrno::Inval)?;
        // The page and the port are required by the protocol, but the embedding program passes
        // connections.
        args.next().zip(args.next()).ok_or(XsErrno::Inval)?;
        self.introduce(domid);
        Ok(ok())
    }

    pub(crate) fn release_request(&mut self, payload: &[u8]) -> Response {
        let domid = strings(payload).next().and_then(real_guest).ok_or(XsErrno::Inval)?;
        if self.release(domid) { Ok(ok()) } else { Err(XsErrno::NoEnt) }
    }

    pub(crate) fn set_target_request(&mut self, payload: &[u8]) -> Response {
        let mut args = strings(payload);
        let domid = args.next().and_then(real_guest).ok_or(XsErrno::Inval)?;
        let target = args.next().and_then(real_guest).ok_or(XsErrno::Inval)?;
        if self.set_target(domid, target) { Ok(ok()) } else { Err(XsErrno::NoEnt) }
    }

    pub(crate) fn control(&mut self, payload: &[u8]) -> Response {
        let mut args = strings(payload);
        match args.next() {
            Some(b"check") => self.check().map(|()| ok()).map_err(|_| XsErrno::Io),
            Some(b"help") => Ok(text("check\nhelp\nquota [<domid>]")),
            Some(b"quota") => {
                let q = &self.quota;
                let lines = match args.next() {
                    None | Some(b"") => format!(
                        "nodes {}\nwatches {}\ntransactions {}\noutstanding {}\ntransaction-nodes {}\nmemory {}\nnode-size {}\npermissions {}",
                        q.nodes,
                        q.watches,
                        q.transactions,
                        q.outstanding,
                        q.transaction_nodes,
                        q.memory,
                        q.node_size,
                        q.perms
                    ),
                    Some(arg) => {
                        let domid = parse_u16(arg).map(DomId).ok_or(XsErrno::Inval)?;
                        let d = self.domains.get(&domid).ok_or(XsErrno::NoEnt)?;
                        format!(
                            "nodes {}\nwatches {}\nmemory {}",
                            self.tree.owned(domid).nodes,
                            d.watches,
                            self.held(domid)
                        )
                    }
                };
                Ok(text(&lines))
            }
            _ => Err(XsErrno::Inval),
        }
    }
}

fn real_guest(text: &[u8]) -> Option<DomId> {
    parse_u16(text).map(DomId).filter(|d| *d != DomId::DOM0 && d.is_real())
}
