//! `nacre disk` on the command line.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use clap::{Args, Subcommand, ValueEnum};
use nacre_anchor::AnchorSpec;

use super::BrokerArgs;
use crate::size::Size;

#[derive(Debug, Subcommand)]
pub(crate) enum DiskCommand {
    /// Make a disk on a store
    Format(FormatArgs),
    /// Make a disk a block device of this machine, served in the background until `close`; prints the device
    Open(OpenArgs),
    /// End a disk that `open` or `serve` runs
    Close(CloseArgs),
    /// Serve a disk over NBD
    Serve(ServeArgs),
    /// Show a disk, running or closed, and what is guaranteed
    Info(InfoArgs),
    /// Verify all of a closed disk, and name every damaged range
    Check(CheckArgs),
    /// Make a disk larger, while it runs or while it is closed
    Grow(GrowArgs),
    /// Give a closed disk another key, without writing its data again
    Rekey(RekeyArgs),
}

/// Where the key of a disk comes from: at least 32 random bytes.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Key")]
pub(crate) struct DiskKeyArgs {
    /// A file with the disk's key: 32 random bytes or more, as from `head -c 32 /dev/urandom`; - is standard input
    #[arg(long, value_name = "FILE", group = "disk-key")]
    pub(crate) key_file: Option<PathBuf>,
    /// An open file descriptor to read the key from
    #[arg(long, value_name = "FD", group = "disk-key")]
    pub(crate) key_fd: Option<u32>,
    /// A broker's resource with the key: kbs:///repository/type/tag
    #[arg(long, value_name = "URI", group = "disk-key")]
    pub(crate) key_resource: Option<String>,
    #[command(flatten)]
    pub(crate) broker: BrokerArgs,
}

/// Which anchor a disk has.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Rollback")]
pub(crate) struct AnchorArgs {
    /// The place that remembers how far the disk had come: none, file:PATH, broker:REPOSITORY/NAME, or
    /// tpm:WHERE[,index=0x01800010][,owner-file=PATH], WHERE being a device, swtpm's socket or HOST:PORT
    #[arg(long, value_name = "ANCHOR", default_value = "none")]
    pub(crate) anchor: AnchorSpec,
}

/// How a disk is run.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Running")]
pub(crate) struct RunDiskArgs {
    #[command(flatten)]
    pub(crate) key: DiskKeyArgs,
    #[command(flatten)]
    pub(crate) anchor: AnchorArgs,
    /// When the anchor moves on: every-flush, on-close, or after a time as in 500ms or 10s. What was flushed since can be rolled back unseen
    /// after a crash
    #[arg(long, value_name = "WHEN", default_value = "every-flush")]
    pub(crate) anchor_window: Window,
    /// Open a disk that has an anchor without it; a rollback is not seen
    #[arg(long)]
    pub(crate) accept_rollback: bool,
    /// Memory for the index and everything else
    #[arg(long, value_name = "SIZE", default_value = "64M")]
    pub(crate) memory: Size,
    /// Take no writes
    #[arg(long)]
    pub(crate) read_only: bool,
    /// Let the store forget what became free; its host learns what that is
    #[arg(long)]
    pub(crate) discard: bool,
    /// Serve Prometheus metrics at this address
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub(crate) metrics: Option<SocketAddr>,
    #[command(flatten)]
    pub(crate) run: RunDirArgs,
}

/// Where running disks are found.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct RunDirArgs {
    /// The directory of what runs [default: /run/nacre for root, $XDG_RUNTIME_DIR/nacre for others]
    #[arg(long, env = "NACRE_RUN", value_name = "DIR", help_heading = "Running")]
    pub(crate) run_dir: Option<PathBuf>,
}

/// When an anchor moves on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Window {
    /// Before a flush returns.
    EveryFlush,
    /// After a time.
    Every(Duration),
    /// When the disk is closed.
    OnClose,
}

impl std::str::FromStr for Window {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is none of every-flush, on-close and a time such as 500ms or 10s");
        let every = |digits: &str, millis: u64| {
            let number = digits.parse::<u64>().ok().filter(|_| digits.bytes().all(|digit| digit.is_ascii_digit()));
            let time =
                number.and_then(|number| number.checked_mul(millis)).filter(|time| (1..=86_400_000).contains(time));
            time.map(|time| Self::Every(Duration::from_millis(time))).ok_or_else(wrong)
        };
        match text {
            "every-flush" => Ok(Self::EveryFlush),
            "on-close" => Ok(Self::OnClose),
            _ => match (text.strip_suffix("ms"), text.strip_suffix('s')) {
                (Some(digits), _) => every(digits, 1),
                (None, Some(digits)) => every(digits, 1000),
                (None, None) => Err(wrong()),
            },
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct FormatArgs {
    /// The store: a file (made where it is missing), a block device, a directory (named with a / at its end, if it is to be made), or
    /// s3://BUCKET/PREFIX
    #[arg(value_name = "STORE")]
    pub(crate) store: String,
    /// The size of the disk, as in 10G [default: as large as the store has room for]
    #[arg(long, value_name = "SIZE")]
    pub(crate) size: Option<Size>,
    /// Percent of the size that is kept free for cleaning; more makes random writes of a full disk faster
    #[arg(long, value_name = "PERCENT", default_value_t = 10)]
    pub(crate) reserve: u8,
    /// Write all of a new file once: nothing shows then which places were ever used
    #[arg(long)]
    pub(crate) preallocate: bool,
    /// Overwrite what is on the store, and take over what the anchor holds
    #[arg(long)]
    pub(crate) force: bool,
    #[command(flatten)]
    pub(crate) key: DiskKeyArgs,
    #[command(flatten)]
    pub(crate) anchor: AnchorArgs,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// How a disk becomes a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum DeviceKind {
    /// The best that this kernel has
    Auto,
    /// ublk
    Ublk,
    /// The kernel's NBD client
    Nbd,
    /// A FUSE file and a loop device
    Fuse,
}

#[derive(Debug, Args)]
pub(crate) struct OpenArgs {
    /// The store that the disk is on
    #[arg(value_name = "STORE")]
    pub(crate) store: String,
    /// How it becomes a device
    #[arg(long, value_name = "KIND", default_value = "auto")]
    pub(crate) device: DeviceKind,
    /// Bytes of a sector: 4096, or 512 for what cannot live with that
    #[arg(long, value_name = "BYTES", default_value_t = 4096)]
    pub(crate) block_size: u32,
    /// Stay in the foreground, until SIGTERM or `close`
    #[arg(long)]
    pub(crate) foreground: bool,
    /// This is the process in the background
    #[arg(long, hide = true, env = "NACRE_DISK_DETACHED")]
    pub(crate) detached: bool,
    #[command(flatten)]
    pub(crate) disk: RunDiskArgs,
}

#[derive(Debug, Args)]
pub(crate) struct ServeArgs {
    /// The store that the disk is on
    #[arg(value_name = "STORE")]
    pub(crate) store: String,
    /// Listen at a socket file, for its owner only; may be repeated
    #[arg(long, value_name = "PATH", required_unless_present = "listen", help_heading = "Server")]
    pub(crate) socket: Vec<PathBuf>,
    /// Listen at a TCP address; may be repeated
    #[arg(long, value_name = "ADDRESS:PORT", help_heading = "Server")]
    pub(crate) listen: Vec<SocketAddr>,
    /// The server's certificate, PEM; then clients have to use TLS
    #[arg(long, value_name = "FILE", requires = "tls_key", help_heading = "Server")]
    pub(crate) tls_cert: Option<PathBuf>,
    /// The certificate's private key, PEM
    #[arg(long, value_name = "FILE", requires = "tls_cert", help_heading = "Server")]
    pub(crate) tls_key: Option<PathBuf>,
    /// Serve only clients with a certificate of these authorities, PEM
    #[arg(long, value_name = "FILE", requires = "tls_cert", help_heading = "Server")]
    pub(crate) tls_client_ca: Option<PathBuf>,
    /// Serve a TCP address without TLS: for loopback, or behind what does TLS
    #[arg(long, conflicts_with = "tls_cert", help_heading = "Server")]
    pub(crate) insecure_tcp: bool,
    /// The export's name
    #[arg(long, value_name = "NAME", default_value = "", hide_default_value = true, help_heading = "Server")]
    pub(crate) name: String,
    /// The most clients at a time
    #[arg(long, value_name = "NUMBER", default_value_t = nacre_export::nbd::NbdSettings::MAX_CONNECTIONS, help_heading = "Server")]
    pub(crate) max_clients: usize,
    #[command(flatten)]
    pub(crate) disk: RunDiskArgs,
}

#[derive(Debug, Args)]
pub(crate) struct CloseArgs {
    /// The device that `open` printed, or the store
    #[arg(value_name = "DEVICE|STORE")]
    pub(crate) what: String,
    #[command(flatten)]
    pub(crate) run: RunDirArgs,
}

#[derive(Debug, Args)]
pub(crate) struct InfoArgs {
    /// The store, or the device of a running disk
    #[arg(value_name = "DEVICE|STORE")]
    pub(crate) what: String,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) key: DiskKeyArgs,
    #[command(flatten)]
    pub(crate) anchor: AnchorArgs,
    /// Show a disk that has an anchor without it
    #[arg(long)]
    pub(crate) accept_rollback: bool,
    #[command(flatten)]
    pub(crate) run: RunDirArgs,
}

#[derive(Debug, Args)]
pub(crate) struct CheckArgs {
    /// The store that the disk is on
    #[arg(value_name = "STORE")]
    pub(crate) store: String,
    /// Also print where everything is on the store
    #[arg(long)]
    pub(crate) dump_layout: bool,
    /// Threads [default: one a processor]
    #[arg(long, value_name = "NUMBER", default_value_t = 0, hide_default_value = true)]
    pub(crate) threads: usize,
    /// Check a disk that has an anchor without it
    #[arg(long)]
    pub(crate) accept_rollback: bool,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) key: DiskKeyArgs,
    #[command(flatten)]
    pub(crate) anchor: AnchorArgs,
}

#[derive(Debug, Args)]
pub(crate) struct GrowArgs {
    /// The store, or the device of a running disk
    #[arg(value_name = "DEVICE|STORE")]
    pub(crate) what: String,
    /// The new size, as in 20G
    #[arg(long, value_name = "SIZE")]
    pub(crate) size: Size,
    #[command(flatten)]
    pub(crate) key: DiskKeyArgs,
    #[command(flatten)]
    pub(crate) anchor: AnchorArgs,
    #[command(flatten)]
    pub(crate) run: RunDirArgs,
}

#[derive(Debug, Args)]
pub(crate) struct RekeyArgs {
    /// The store that the disk is on
    #[arg(value_name = "STORE")]
    pub(crate) store: String,
    /// A file with the new key
    #[arg(long, value_name = "FILE", group = "new-key", help_heading = "New key")]
    pub(crate) new_key_file: Option<PathBuf>,
    /// An open file descriptor to read the new key from
    #[arg(long, value_name = "FD", group = "new-key", help_heading = "New key")]
    pub(crate) new_key_fd: Option<u32>,
    /// A broker's resource with the new key: kbs:///repository/type/tag
    #[arg(long, value_name = "URI", group = "new-key", help_heading = "New key")]
    pub(crate) new_key_resource: Option<String>,
    /// Also seal what is written from now on with other keys; what was written before stays as it is
    #[arg(long)]
    pub(crate) rotate: bool,
    #[command(flatten)]
    pub(crate) key: DiskKeyArgs,
    #[command(flatten)]
    pub(crate) anchor: AnchorArgs,
    /// Where the anchor's state moves: a TPM's index belongs to a key, so that a new key needs a new index
    #[arg(long, value_name = "ANCHOR")]
    pub(crate) new_anchor: Option<AnchorSpec>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_are_spelled_like_this() {
        for (text, window) in [
            ("every-flush", Window::EveryFlush),
            ("on-close", Window::OnClose),
            ("500ms", Window::Every(Duration::from_millis(500))),
            ("10s", Window::Every(Duration::from_secs(10))),
        ] {
            assert_eq!(text.parse(), Ok(window));
        }
        for text in ["", "s", "ms", "0s", "+1s", "1", "1m", "1.5s", "86401s", "99999999999999999999s", "never"] {
            assert!(text.parse::<Window>().is_err(), "{text}");
        }
    }
}
