//! What there is to say about lazy images.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

use nacre_lazyd::{KeepArgs, ServeArgs};

use super::{KeyArgs, ProcessArgs, RegistryArgs, SignArgs, TrustArgs};
use crate::size::Size;

/// How an image becomes a filesystem.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Front {
    /// EROFS where the kernel mounts it from files (Linux 6.12), or else FUSE
    Auto,
    /// EROFS, or an error
    Erofs,
    /// FUSE
    Fuse,
}

/// Where lazy images keep what they read, and how they are served.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Lazy images")]
pub(crate) struct LazyArgs {
    /// Keep the ciphertext that was read in this directory, which may be shared and is not trusted [default: lazy/chunks in the store]
    #[arg(long, value_name = "DIR")]
    pub(crate) cache: Option<PathBuf>,
    /// The most that is kept there [default: 10G]
    #[arg(long, value_name = "SIZE")]
    pub(crate) cache_limit: Option<Size>,
    /// How many seconds a read waits for a registry that does not answer, before it fails [default: 60]
    #[arg(long, value_name = "SECONDS")]
    pub(crate) patience: Option<u64>,
    /// The most bytes a second that are fetched, 64K or more; what somebody waits for goes before what is fetched ahead [default: 0, no limit]
    #[arg(long, value_name = "SIZE")]
    pub(crate) bandwidth: Option<Size>,
    /// How the image becomes a filesystem [default: auto]
    #[arg(long, value_enum)]
    pub(crate) front: Option<Front>,
}

#[derive(Debug, Args)]
pub(crate) struct MountArgs {
    /// The image, which `image copy --lazy` made
    #[arg(value_name = "REF")]
    pub(crate) image: String,
    /// Where to mount it, read-only
    #[arg(value_name = "DIR")]
    pub(crate) target: PathBuf,
    /// Fetch all of it while it is in use, so that the registry may go away
    #[arg(long)]
    pub(crate) complete: bool,
    /// Serve it in this process, and not by the daemon that serves all others: it ends with this process
    #[arg(long)]
    pub(crate) foreground: bool,
    #[command(flatten)]
    pub(crate) lazy: LazyArgs,
    #[command(flatten)]
    pub(crate) trust: TrustArgs,
    #[command(flatten)]
    pub(crate) keys: KeyArgs,
    #[command(flatten)]
    pub(crate) registry: RegistryArgs,
}

/// The daemon that serves the mounted images of a store.
#[derive(Debug, Subcommand)]
pub(crate) enum DaemonCommand {
    /// Have another process take over, which may be of a newer program; readers do not notice
    Restart,
    /// Hold what keeps mounts alive, and start the daemon
    #[command(hide = true)]
    Keep(KeepArgs),
    /// Be the daemon
    #[command(hide = true)]
    Serve(ServeArgs),
}

#[derive(Debug, Args)]
pub(crate) struct TraceArgs {
    /// The image, which `image copy --lazy` made
    #[arg(value_name = "REF")]
    pub(crate) image: String,
    /// Where the image with the trace shall go
    #[arg(value_name = "DEST")]
    pub(crate) destination: String,
    /// End the run after so many seconds, if it has not ended itself: SIGTERM, and SIGKILL ten seconds later
    #[arg(long = "for", value_name = "SECONDS")]
    pub(crate) seconds: Option<u64>,
    /// For whom an encrypted image is encrypted, as for `image copy`; may be repeated
    #[arg(long, value_name = "KEY")]
    pub(crate) encrypt: Vec<String>,
    /// Print the result as JSON
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) process: ProcessArgs,
    #[command(flatten)]
    pub(crate) sign: SignArgs,
    #[command(flatten)]
    pub(crate) lazy: LazyArgs,
    #[command(flatten)]
    pub(crate) trust: TrustArgs,
    #[command(flatten)]
    pub(crate) keys: KeyArgs,
    #[command(flatten)]
    pub(crate) registry: RegistryArgs,
}

/// How a lazy image is made.
#[derive(Debug, Args)]
#[command(next_help_heading = "Lazy images")]
pub(crate) struct MakeLazyArgs {
    /// Make a lazy image, which starts before it is downloaded; encrypted with --encrypt
    #[arg(long, conflicts_with_all = ["compression", "encrypt_layer"])]
    pub(crate) lazy: bool,
    /// Share equal chunks with all images that are made with this key: 32 bytes in a file, for builders only, not for guests [default: none;
    /// no other image can be compared with this one]
    #[arg(long, value_name = "FILE", requires = "lazy", requires = "encrypt")]
    pub(crate) domain_key_file: Option<PathBuf>,
    /// Do not store what this lazy image has, which then belongs to both; may be repeated
    #[arg(long, value_name = "REF", requires = "lazy")]
    pub(crate) dedup_from: Vec<String>,
    /// The average size of chunks: 16K, 32K, 64K or 128K
    #[arg(long, value_name = "SIZE", default_value = "64K", requires = "lazy")]
    pub(crate) chunk_size: Size,
    /// zstd's level, from -7 to 22
    #[arg(long, value_name = "LEVEL", default_value_t = 3, requires = "lazy", allow_negative_numbers = true)]
    pub(crate) level: i32,
}
