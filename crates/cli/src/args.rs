//! The command line: noun, then verb. This module only says what there is; `commands` does it.

pub(crate) mod attest;
pub(crate) mod broker;
pub(crate) mod disk;
pub(crate) mod index;
pub(crate) mod lazy;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

pub(crate) use self::attest::{AttestCommand, CollateralCommand, EvidenceArgs, TeeName};
use broker::BrokerCommand;

/// Trusted storage for confidential containers.
#[derive(Debug, Parser)]
#[command(
    name = "nacre",
    version,
    propagate_version = true,
    after_help = "Exit codes: 0 ok, 2 usage, 3 not trusted (policy, signature, integrity, attestation), 4 not found,\n\
                  5 I/O or network, 6 conflict (in use), 1 anything else."
)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Options of every command.
#[derive(Debug, Clone, Args)]
pub(crate) struct Global {
    /// The image store [default: /var/lib/nacre for root, ~/.local/share/nacre for others]
    #[arg(long, global = true, env = "NACRE_ROOT", value_name = "DIR")]
    pub(crate) root: Option<PathBuf>,
    /// The configuration file; flags and environment variables go before it [default: /etc/nacre/nacre.toml, where it is]
    #[arg(long, global = true, env = "NACRE_CONFIG", value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Allow a store in memory (tmpfs)
    #[arg(long, global = true)]
    pub(crate) allow_tmpfs: bool,
    /// No progress, errors only
    #[arg(long, short, global = true)]
    pub(crate) quiet: bool,
    /// What to log to standard error, as in `info` or `nacre_oci=debug` [default: warn]
    #[arg(long, global = true, env = "NACRE_LOG", value_name = "FILTER")]
    pub(crate) log: Option<String>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Show everything at work: registry, broker, an encrypted and signed image in an attested guest, and attacks being refused
    Demo(DemoArgs),
    /// Pull an image and run it
    Run(Box<RunArgs>),
    /// Images: pull, copy, list, inspect, verify, remove
    #[command(subcommand)]
    Image(Box<ImageCommand>),
    /// The key broker
    #[command(subcommand)]
    Broker(Box<BrokerCommand>),
    /// Secure disks: make, open, serve, show, check, grow, rekey
    #[command(subcommand)]
    Disk(Box<disk::DiskCommand>),
    /// Attestation of this machine
    #[command(subcommand)]
    Attest(Box<AttestCommand>),
    /// Ask this guest's daemon, nacre-guestd
    #[command(subcommand)]
    Guest(GuestCommand),
    /// Print a completion script for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Write manual pages into a directory
    Man {
        /// The directory
        dir: PathBuf,
    },
    /// The guest of the demo, as a process of its own so that it can be measured
    #[command(hide = true)]
    DemoGuest(DemoGuestArgs),
    /// The workload of the demo's image
    #[command(hide = true)]
    DemoWorkload,
}

#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    /// Leave everything that the demo made, and say where
    #[arg(long)]
    pub(crate) keep: bool,
    /// Where the demo works [default: a new directory in the system's temporary directory, or in /var/tmp if that is in memory]
    #[arg(long, value_name = "DIR")]
    pub(crate) dir: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct DemoGuestArgs {
    /// The guest's init data, with its configuration
    #[arg(long)]
    pub(crate) guest_init_data: PathBuf,
    /// The platform key of the simulated TEE
    #[arg(long)]
    pub(crate) platform_key: PathBuf,
    /// Where to write what happened
    #[arg(long)]
    pub(crate) report: PathBuf,
    /// The image
    pub(crate) image: String,
}

/// Where images come from, and how registries are talked to.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Registries")]
pub(crate) struct RegistryArgs {
    /// Talk to registries over plain HTTP or unverified TLS where they are not to be had otherwise
    #[arg(long)]
    pub(crate) insecure_registry: bool,
    /// Credentials [default: $REGISTRY_AUTH_FILE, then where podman and docker keep theirs]
    #[arg(long, value_name = "FILE")]
    pub(crate) authfile: Option<PathBuf>,
    /// registries.conf [default: the user's, then /etc/containers/registries.conf]
    #[arg(long, env = "CONTAINERS_REGISTRIES_CONF", value_name = "FILE")]
    pub(crate) registries_conf: Option<PathBuf>,
    /// Further CA certificates, PEM; may be repeated
    #[arg(long, value_name = "FILE")]
    pub(crate) ca: Vec<PathBuf>,
    /// Ask this cache of the node for blobs first, as Dragonfly or Spegel is one: http[s]://host[:port]
    #[arg(long, value_name = "URL")]
    pub(crate) node_cache: Option<String>,
    /// Directories of certificates by registry, as certs.d of docker and podman
    #[arg(long, value_name = "DIR")]
    pub(crate) cert_dir: Option<PathBuf>,
    /// The platform to choose from an index, as os/architecture[/variant] [default: this machine's]
    #[arg(long, value_name = "PLATFORM")]
    pub(crate) platform: Option<String>,
}

/// What an image must bring to be trusted.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Trust")]
pub(crate) struct TrustArgs {
    /// The trust policy: a file, a kbs:// resource, or init-data:NAME [default: $NACRE_POLICY, the configuration's, the user's
    /// containers/policy.json, /etc/containers/policy.json]
    #[arg(long, value_name = "POLICY")]
    pub(crate) policy: Option<String>,
    /// Use no trust policy at all
    #[arg(long, conflicts_with = "policy")]
    pub(crate) insecure_policy: bool,
    /// Also allow images that are neither signed nor encrypted
    #[arg(long)]
    pub(crate) allow_unsigned: bool,
    /// Directory of signature storage configurations [default: the user's, then /etc/containers/registries.d]
    #[arg(long, value_name = "DIR")]
    pub(crate) registries_d: Option<PathBuf>,
}

/// Where the keys of encrypted layers come from.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Keys")]
pub(crate) struct KeyArgs {
    /// A key to decrypt layers with, as skopeo spells it: FILE[:pass=…|:file=…|:fd=…], provider:NAME[:…], pkcs11:…; may be repeated
    #[arg(long, value_name = "KEY")]
    pub(crate) decryption_key: Vec<String>,
    #[command(flatten)]
    pub(crate) broker: BrokerArgs,
}

/// The key broker of a guest, and what the guest shows to it.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Keys")]
pub(crate) struct BrokerArgs {
    /// The key broker, to which this guest attests for kbs:// resources [default: the configuration's]
    #[arg(long, env = "NACRE_BROKER", value_name = "URL")]
    pub(crate) broker: Option<String>,
    /// The broker's TLS certificate, pinned
    #[arg(long, value_name = "FILE")]
    pub(crate) broker_cert: Option<PathBuf>,
    /// The public key that signs the broker's tokens
    #[arg(long, value_name = "FILE")]
    pub(crate) broker_token_key: Option<PathBuf>,
    /// The platform key of the simulated TEE, for guests without a real one
    #[arg(long, value_name = "FILE")]
    pub(crate) sim_platform_key: Option<PathBuf>,
    /// The guest's init data, which the evidence binds
    #[arg(long, value_name = "FILE")]
    pub(crate) init_data: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct PullArgs {
    /// The image: docker://…, oci:DIR[:TAG], oci-archive:…, docker-archive:…, dir:…, or a name for registries.conf
    #[arg(value_name = "REF")]
    pub(crate) image: String,
    /// Make a bundle there: rootfs, mounted, and config.json
    #[arg(long, value_name = "DIR")]
    pub(crate) bundle: Option<PathBuf>,
    /// Print the result as JSON
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) trust: TrustArgs,
    #[command(flatten)]
    pub(crate) keys: KeyArgs,
    #[command(flatten)]
    pub(crate) registry: RegistryArgs,
}

/// What is run of an image, and how.
#[derive(Debug, Args)]
pub(crate) struct ProcessArgs {
    /// What to run instead of the image's command
    #[arg(last = true, value_name = "CMD")]
    pub(crate) command: Vec<String>,
    /// Set an environment variable, NAME=value; may be repeated
    #[arg(long, short, value_name = "NAME=VALUE")]
    pub(crate) env: Vec<String>,
    /// Run as user[:group], names of the image or numbers
    #[arg(long, short, value_name = "USER")]
    pub(crate) user: Option<String>,
    /// The working directory
    #[arg(long, short, value_name = "DIR")]
    pub(crate) workdir: Option<String>,
    /// Make the root filesystem read-only
    #[arg(long)]
    pub(crate) read_only: bool,
    /// The OCI runtime [default: the first of runc, crun and youki on PATH, or else a built-in one]
    #[arg(long, value_name = "RUNTIME")]
    pub(crate) runtime: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    /// The image, as for `image pull`
    #[arg(value_name = "IMAGE")]
    pub(crate) image: String,
    #[command(flatten)]
    pub(crate) process: ProcessArgs,
    /// Use the stored image as it is, without asking its registry; the policy is checked all the same
    #[arg(long, conflicts_with = "lazy")]
    pub(crate) offline: bool,
    /// Mount a lazy image instead of pulling it: it starts before it is downloaded
    #[arg(long)]
    pub(crate) lazy: bool,
    #[command(flatten)]
    pub(crate) lazy_options: lazy::LazyArgs,
    #[command(flatten)]
    pub(crate) trust: TrustArgs,
    #[command(flatten)]
    pub(crate) keys: KeyArgs,
    #[command(flatten)]
    pub(crate) registry: RegistryArgs,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ImageCommand {
    /// Pull an image into the store: resolve, check the policy, verify, decrypt, unpack
    Pull(PullArgs),
    /// Copy an image between transports; encrypt, decrypt, sign on the way
    Copy(CopyArgs),
    /// Make an index of an ordinary image and put it beside it, so that it can be mounted, too, before it is downloaded
    Index(Box<index::IndexArgs>),
    /// Mount a lazy image, or an ordinary one that has an index: it is read from its registry as it is used
    Mount(Box<lazy::MountArgs>),
    /// Run a lazy image, and write it with a trace of what the run read first, which later mounts fetch ahead
    Trace(Box<lazy::TraceArgs>),
    /// Fetch all of a mounted lazy image, so that the registry may go away; returns when it is there
    Complete {
        /// The mount point, or the image as it was named when it was mounted
        #[arg(value_name = "DIR|REF")]
        what: String,
    },
    /// The daemon that serves lazy images
    #[command(subcommand)]
    Daemon(lazy::DaemonCommand),
    /// List the images of the store, and the lazy images that are mounted
    Ls {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Show an image of the store, or of a transport, without pulling it; of a lazy image also its chunks, and what it shares
    Inspect(Box<InspectArgs>),
    /// Check an image against the policy, without unpacking it; say who vouches for it
    Verify(VerifyArgs),
    /// Remove an image from the store
    Rm {
        /// Names, or digests of at least six digits
        #[arg(required = true, value_name = "IMAGE")]
        images: Vec<String>,
    },
    /// Remove layers that no image has, and what killed processes left
    Gc {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Unmount a lazy image, or a bundle that `pull --bundle` made, whose changes are forgotten
    Umount {
        /// The mount point, or the bundle
        bundle: PathBuf,
    },
}

/// Which image is looked at, and how it is shown.
#[derive(Debug, Args)]
pub(crate) struct LookArgs {
    /// The image: a name or digest of the store, or a location
    #[arg(value_name = "IMAGE")]
    pub(crate) image: String,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
    /// Ask the image's transport, even if it is in the store
    #[arg(long)]
    pub(crate) remote: bool,
    #[command(flatten)]
    pub(crate) registry: RegistryArgs,
}

#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    #[command(flatten)]
    pub(crate) look: LookArgs,
    /// Also say how much a lazy image has in common with this one; may be repeated
    #[arg(long, value_name = "REF")]
    pub(crate) shared_with: Vec<String>,
    #[command(flatten)]
    pub(crate) keys: KeyArgs,
}

#[derive(Debug, Args)]
pub(crate) struct VerifyArgs {
    #[command(flatten)]
    pub(crate) look: LookArgs,
    #[command(flatten)]
    pub(crate) broker: BrokerArgs,
    #[command(flatten)]
    pub(crate) trust: TrustArgs,
}

/// Who signs what is written.
#[derive(Debug, Args)]
pub(crate) struct SignArgs {
    /// Sign with a key: a cosign private key file, or gpg:SECRET-KEY-FILE; may be repeated
    #[arg(long, value_name = "KEY")]
    pub(crate) sign: Vec<String>,
    /// A file with the passphrase of the signing key; its first line counts
    #[arg(long, value_name = "FILE", requires = "sign")]
    pub(crate) sign_passphrase_file: Option<PathBuf>,
    /// The name that the signature is about [default: the destination's]
    #[arg(long, value_name = "REF", requires = "sign")]
    pub(crate) sign_identity: Option<String>,
    /// Sign with sigstore bundles among the referrers, as cosign 3 does, instead of signature tags
    #[arg(long, requires = "sign")]
    pub(crate) sign_bundle: bool,
}

#[derive(Debug, Args)]
pub(crate) struct CopyArgs {
    /// Where the image is
    #[arg(value_name = "SRC")]
    pub(crate) source: String,
    /// Where it shall go
    #[arg(value_name = "DST")]
    pub(crate) destination: String,
    /// Encrypt layers for a recipient, as skopeo spells it: jwe:PUBLIC.pem, pkcs7:CERT.pem, pgp:NAME, pkcs11:…, provider:NAME[:…]; may be
    /// repeated
    #[arg(long, value_name = "KEY")]
    pub(crate) encrypt: Vec<String>,
    /// Encrypt only these layers; 0 is the bottom one, -1 the top one [default: all]
    #[arg(long, value_name = "INDEX", allow_negative_numbers = true, requires = "encrypt")]
    pub(crate) encrypt_layer: Vec<i32>,
    /// A key to decrypt layers with; may be repeated
    #[arg(long, value_name = "KEY")]
    pub(crate) decryption_key: Vec<String>,
    #[command(flatten)]
    pub(crate) sign: SignArgs,
    /// Copy every platform of an index
    #[arg(long)]
    pub(crate) all: bool,
    /// Do not copy signatures that the source has
    #[arg(long)]
    pub(crate) remove_signatures: bool,
    /// Compress plain layers anew: gzip, zstd or none
    #[arg(long, value_name = "ALGORITHM")]
    pub(crate) compression: Option<String>,
    /// Copy only what this trust policy lets in [default: no policy; a copy is not made trusted by being made]
    #[arg(long, value_name = "FILE")]
    pub(crate) policy: Option<PathBuf>,
    /// Directory of signature storage configurations [default: the user's, then /etc/containers/registries.d]
    #[arg(long, value_name = "DIR")]
    pub(crate) registries_d: Option<PathBuf>,
    /// Print the result as JSON
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) make_lazy: lazy::MakeLazyArgs,
    #[command(flatten)]
    pub(crate) registry: RegistryArgs,
}

/// Where the guest's daemon serves.
#[derive(Debug, Args)]
pub(crate) struct GuestAt {
    /// The daemon's socket
    #[arg(
        long,
        env = "NACRE_GUEST_SOCKET",
        value_name = "PATH",
        default_value = "/run/confidential-containers/cdh.sock"
    )]
    pub(crate) socket: PathBuf,
}

#[derive(Debug, Subcommand)]
pub(crate) enum GuestCommand {
    /// Have an image pulled; prints its manifest's digest
    Pull {
        /// The image, as for `image pull`
        #[arg(value_name = "REF")]
        image: String,
        /// Have a bundle made there too
        #[arg(long, value_name = "DIR")]
        bundle: Option<PathBuf>,
        #[command(flatten)]
        at: GuestAt,
    },
    /// Have a broker's resource released, and write it to standard output
    Resource {
        /// kbs:///repository/type/tag
        #[arg(value_name = "URI")]
        uri: String,
        #[command(flatten)]
        at: GuestAt,
    },
}
