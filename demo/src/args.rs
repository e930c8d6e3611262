//! Arguments of `pvio run` and `pvio check`.

use clap::Args;
use pvio_daemon::disks::args::ImageRootArgs;
use pvio_daemon::failure::Failure;
use pvio_daemon::isolation::IsolationArgs;
use pvio_storage::image::Disk;
use pvio_xenbus::handshake::vif::Mac;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::str::FromStr;

/// Arguments of both commands.
#[derive(Debug, Clone, Args)]
pub struct CommonArgs {
    /// The guest's name
    #[arg(long, default_value = "guest")]
    pub name: String,
    /// Directory of all sockets and logs; if left out, one that is removed afterwards
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
    /// Access the image without the host's page cache (O_DIRECT)
    #[arg(long)]
    pub direct: bool,
    #[command(flatten)]
    /// Directories of the files that the image names.
    pub image_roots: ImageRootArgs,
    #[command(flatten)]
    /// Processes of the devices.
    pub isolation: IsolationArgs,
}

impl CommonArgs {
    /// Returns the disk with these options and an absolute path.
    ///
    /// # Errors
    /// There is no current directory.
    pub fn disk(&self, disk: &Disk) -> Result<Disk, Failure> {
        let spec = disk.spec.clone().absolute().map_err(Failure::foreign)?;
        let mut options = disk.options.clone();
        if self.direct {
            options.direct = Some(true);
        }
        self.image_roots.add_to(&mut options)?;
        options.trace =
            options.trace.map(std::path::absolute).transpose().map_err(Failure::foreign)?;
        Ok(Disk { options, spec })
    }
}

/// An IPv4 address and its prefix length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cidr {
    /// The address.
    pub address: Ipv4Addr,
    /// Length of the network prefix in bits.
    pub prefix: u8,
}

impl Cidr {
    /// Returns the host's address: the first address of the network, or the second if the first is
    /// taken.
    #[must_use]
    pub fn host(&self) -> Ipv4Addr {
        let mask = u32::MAX.checked_shl(32 - u32::from(self.prefix)).unwrap_or(0);
        let first = (u32::from(self.address) & mask) + 1;
        let own = u32::from(self.address);
        Ipv4Addr::from(if first == own { first + 1 } else { first })
    }
}

impl FromStr for Cidr {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || "give an address and a prefix length, as in 10.107.0.2/24".to_owned();
        let (address, prefix) = text.split_once('/').ok_or_else(bad)?;
        let address: Ipv4Addr = address.parse().map_err(|_| bad())?;
        let prefix: u8 = prefix.parse().map_err(|_| bad())?;
        if !(1..=30).contains(&prefix) {
            return Err("the prefix length must be 1 to 30, so that two addresses fit".into());
        }
        let host_bits = u32::from(address) << prefix;
        if host_bits == 0 || host_bits == u32::MAX << prefix {
            return Err(format!("{address} is the network or broadcast address of the network"));
        }
        Ok(Self { address, prefix })
    }
}

impl std::fmt::Display for Cidr {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

/// Parses a unicast MAC address.
pub(crate) fn station(text: &str) -> Result<Mac, String> {
    let mac: Mac = text.parse().map_err(|_| "expected six bytes, as in 00:16:3e:6b:00:02")?;
    if mac.is_multicast() || mac == Mac([0; 6]) {
        return Err("expected a unicast address that is not zero".into());
    }
    Ok(mac)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cidr_parses_and_derives_host_address() {
        let cidr: Cidr = "10.107.0.2/24".parse().unwrap();
        assert_eq!(cidr.host(), Ipv4Addr::new(10, 107, 0, 1));
        let first: Cidr = "192.168.4.1/30".parse().unwrap();
        assert_eq!(first.host(), Ipv4Addr::new(192, 168, 4, 2));
        for bad in [
            "10.0.0.0/24",
            "10.0.0.255/24",
            "10.0.0.1",
            "10.0.0.1/31",
            "10.0.0.1/0",
            "x/24",
            "1.2.3.4/99",
        ] {
            assert!(bad.parse::<Cidr>().is_err(), "{bad}");
        }
    }

    #[test]
    fn mac_argument_rejects_multicast_and_zero_addresses() {
        assert_eq!(station("00:16:3e:6b:00:02").unwrap().to_string(), "00:16:3e:6b:00:02");
        for bad in ["", "01:00:00:00:00:00", "00:00:00:00:00:00", "00-16-3e-6b-00-02"] {
            assert!(station(bad).is_err(), "{bad}");
        }
    }
}
