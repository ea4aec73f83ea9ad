//! `nacre broker`: what there is.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::CollateralCommand;

/// Which broker is administered: one that runs, by its address, or the files of one that does not.
#[derive(Debug, Args)]
#[command(next_help_heading = "Broker")]
pub(crate) struct BrokerAt {
    /// The broker's directory
    #[arg(long, env = "NACRE_BROKER_DIR", value_name = "DIR", default_value = "/var/lib/nacre-broker")]
    pub(crate) dir: PathBuf,
    /// The running broker's address; without it, the broker in --dir must not be running
    #[arg(long, value_name = "URL")]
    pub(crate) url: Option<String>,
    /// The running broker's TLS certificate, pinned [default: tls.crt of --dir]
    #[arg(long, value_name = "FILE", requires = "url")]
    pub(crate) cert: Option<PathBuf>,
    /// The public key that signs the broker's tokens [default: token.pub of --dir]
    #[arg(long, value_name = "FILE")]
    pub(crate) token_key: Option<PathBuf>,
    /// The administrator's private key [default: admin.key of --dir]
    #[arg(long, value_name = "FILE")]
    pub(crate) admin_key: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum BrokerCommand {
    /// Make a new broker: its keys, its TLS certificate, its store
    Init {
        /// The broker's directory
        #[arg(long, env = "NACRE_BROKER_DIR", value_name = "DIR", default_value = "/var/lib/nacre-broker")]
        dir: PathBuf,
        /// Release to simulated TEEs too
        #[arg(long)]
        allow_simulated: bool,
        /// A host name or address for the TLS certificate, besides localhost; may be repeated
        #[arg(long, value_name = "NAME")]
        name: Vec<String>,
        /// Keep everything in PostgreSQL, so that there can be replicas: postgresql://USER@HOST/NAME?sslmode=require
        #[arg(long, value_name = "URL")]
        database: Option<String>,
        /// The file with the database's password
        #[arg(long, value_name = "FILE", requires = "database")]
        database_password_file: Option<PathBuf>,
        /// The file with the certificates of who signs the database's [default: the system's roots]
        #[arg(long, value_name = "FILE", requires = "database")]
        database_ca: Option<PathBuf>,
        /// What seals the secrets: file:PATH, an RSA key in a token by its pkcs11: URI, or a TPM: tpm:WHERE[,pcrs=0+2+7][,owner-file=PATH]
        #[arg(long, value_name = "KEY", default_value = "file:master.key")]
        master_key: String,
    },
    /// Serve guests
    Serve {
        /// The broker's directory
        #[arg(long, env = "NACRE_BROKER_DIR", value_name = "DIR", default_value = "/var/lib/nacre-broker")]
        dir: PathBuf,
        /// The address to listen at
        #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:8080")]
        listen: std::net::SocketAddr,
        /// Serve plain HTTP: for loopback, or behind a proxy that does TLS
        #[arg(long)]
        insecure_http: bool,
    },
    /// The master key that seals the secrets
    #[command(subcommand)]
    Master(MasterCommand),
    /// Secrets by repository/type/tag
    #[command(subcommand)]
    Resource(ResourceCommand),
    /// Appraisal and release policies (Rego)
    #[command(subcommand)]
    Policy(PolicyCommand),
    /// Reference values: what guests are expected to measure
    #[command(subcommand)]
    Reference(ReferenceCommand),
    /// Trust the platform key of simulated TEEs
    TrustSim {
        /// Its public key, PEM
        file: PathBuf,
        #[command(flatten)]
        at: BrokerAt,
    },
    /// Leases: who holds which secret, and until when
    #[command(subcommand)]
    Lease(LeaseCommand),
    /// Guests that attested or were refused, and the chain of trust of one
    #[command(subcommand)]
    Guest(BrokerGuestCommand),
    /// Anchors: how far volumes have come that must not be turned back
    #[command(subcommand)]
    Anchor(AnchorCommand),
    /// TPMs whose attestation key was enrolled by `nacre attest enrol`
    #[command(subcommand)]
    Enrolment(EnrolmentCommand),
    /// Administrators beside the first one, with roles
    #[command(subcommand)]
    Admin(AdminCommand),
    /// Make a new key sign attestation tokens; guests that pinned the old one follow it
    RotateTokenKey {
        #[command(flatten)]
        at: BrokerAt,
    },
    /// What vendors of TEEs publish and verifiers need: certificates, revocation lists, TCB info
    #[command(subcommand)]
    Collateral(CollateralCommand),
    /// Print a token for an administrator's own HTTP calls, and to sign in to the console
    Token {
        /// For how long it is good, an hour at most
        #[arg(long, value_name = "SECONDS", default_value_t = 600, value_parser = clap::value_parser!(u32).range(1..=3600))]
        seconds: u32,
        #[command(flatten)]
        at: BrokerAt,
    },
    /// Show what was released to whom, or verify that nothing of it was changed
    #[command(args_conflicts_with_subcommands = true)]
    Audit {
        #[command(subcommand)]
        command: Option<AuditCommand>,
        /// Print JSON
        #[arg(long)]
        json: bool,
        /// Only entries after this number
        #[arg(long, value_name = "NUMBER", default_value_t = 0)]
        after: u64,
        #[command(flatten)]
        at: BrokerAt,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum AuditCommand {
    /// Check the chain of all entries, and print the last one's number and hash
    Verify {
        /// What an earlier run printed, NUMBER:HASH: that entry must still be there as it was
        #[arg(long, value_name = "NUMBER:HASH")]
        head: Option<String>,
        /// Print JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        at: BrokerAt,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum LeaseCommand {
    /// List leases
    Ls {
        /// Print JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        at: BrokerAt,
    },
    /// Revoke leases: their guests are told when they renew, and have to give the secret up
    Revoke {
        /// A lease by its name, as `ls` prints it
        #[arg(required_unless_present_any = ["resource", "measurement"])]
        lease: Option<String>,
        /// All leases of a secret, by its repository/type/tag
        #[arg(long, value_name = "PATH", conflicts_with_all = ["lease", "measurement"])]
        resource: Option<String>,
        /// All leases of guests with a measurement
        #[arg(long, value_name = "HEX", conflicts_with = "lease")]
        measurement: Option<String>,
        #[command(flatten)]
        at: BrokerAt,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum BrokerGuestCommand {
    /// List guests, the newest first
    Ls {
        /// Those that were refused to attest [default: those that attested]
        #[arg(long)]
        refused: bool,
        /// Only those before this one, by its name, as `ls` prints it
        #[arg(long, value_name = "GUEST")]
        before: Option<String>,
        /// So many at most
        #[arg(long, value_name = "NUMBER", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=200))]
        most: u32,
        /// Print JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        at: BrokerAt,
    },
    /// Show the chain of trust of one guest, stage by stage, with what was expected and what was found
    Show {
        /// Its name, as `ls` prints it
        guest: String,
        /// Print JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        at: BrokerAt,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum EnrolmentCommand {
    /// List TPMs
    Ls {
        /// Print JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        at: BrokerAt,
    },
    /// Let the attestation key of a TPM count no more; the TPM cannot be enrolled again
    Revoke {
        /// The TPM, as `ls` names it
        name: String,
        #[command(flatten)]
        at: BrokerAt,
    },
    /// Remove a TPM, which can be enrolled again from then on
    Forget {
        /// The TPM, as `ls` names it
        name: String,
        #[command(flatten)]
        at: BrokerAt,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum AnchorCommand {
    /// List anchors
    Ls {
        /// Print JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        at: BrokerAt,
    },
    /// Remove an anchor, for a volume that is made anew: older copies of the old one are not told from it any more
    Rm {
        /// repository/name
        name: String,
        #[command(flatten)]
        at: BrokerAt,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum RoleArg {
    /// Everything
    Admin,
    /// Secrets, policies, reference values, leases, anchors
    Operator,
    /// Looks only
    Auditor,
}

#[derive(Debug, Subcommand)]
pub(crate) enum AdminCommand {
    /// Let somebody administer, who has the private half of a key
    Add {
        /// Who it is, for the audit log
        name: String,
        /// Their public key, PEM (EC P-256)
        key: PathBuf,
        /// What they may do
        #[arg(long, value_enum)]
        role: RoleArg,
        /// In this repository only
        #[arg(long, value_name = "NAME")]
        repository: Option<String>,
        #[command(flatten)]
        at: BrokerAt,
    },
    /// List administrators
    Ls {
        /// Print JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        at: BrokerAt,
    },
    /// Let somebody administer no more, from now on
    Rm {
        /// Who
        name: String,
        #[command(flatten)]
        at: BrokerAt,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum MasterCommand {
    /// Print the names of the master keys that open the database
    Ls {
        #[command(flatten)]
        dir: BrokerDir,
    },
    /// Seal by another master key from now on; a broker with an embedded database must not be running
    Rotate {
        /// The new one: file:PATH (made where it is not there), an RSA key in a token by its pkcs11: URI, or a TPM: tpm:WHERE[,pcrs=0+2+7][,owner-file=PATH]
        to: String,
        /// Let the old one open the database as well, until `forget`: for replicas that still have it
        #[arg(long)]
        keep_old: bool,
        /// Also replace the key that it wraps, and seal every secret anew
        #[arg(long, conflicts_with = "keep_old")]
        reseal: bool,
        #[command(flatten)]
        dir: BrokerDir,
    },
    /// Let a master key open the database no more
    Forget {
        /// Its name, as `ls` prints it
        name: String,
        #[command(flatten)]
        dir: BrokerDir,
    },
}

/// The broker's directory.
#[derive(Debug, Args)]
pub(crate) struct BrokerDir {
    /// The broker's directory
    #[arg(long, env = "NACRE_BROKER_DIR", value_name = "DIR", default_value = "/var/lib/nacre-broker")]
    pub(crate) dir: PathBuf,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ResourceCommand {
    /// Store a secret
    Put {
        /// repository/type/tag
        path: String,
        /// The file that holds it; - is standard input
        file: PathBuf,
        /// What it is for: opaque, layer-key, volume-key, domain-secret, policy, credential [default: as before, or opaque]
        #[arg(long)]
        kind: Option<String>,
        /// Lend it for so many seconds at a time, instead of for good; 0 ends that
        #[arg(long, value_name = "SECONDS")]
        lease: Option<u32>,
        #[command(flatten)]
        at: BrokerAt,
    },
    /// Make a new version of a key, of random bytes; the old one can still be asked for by its number
    Rotate {
        /// repository/type/tag
        path: String,
        #[command(flatten)]
        at: BrokerAt,
    },
    /// Remove a secret
    Rm {
        /// repository/type/tag
        path: String,
        #[command(flatten)]
        at: BrokerAt,
    },
    /// List secrets: their names, never their values
    Ls {
        /// With kind, version and lease
        #[arg(long, short)]
        long: bool,
        /// Print JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        at: BrokerAt,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum PolicyCommand {
    /// Set the policy that appraises guests
    SetAttestation {
        /// The Rego file
        file: PathBuf,
        /// For this TEE only, as in snp [default: all that have none of their own]
        #[arg(long, value_name = "TEE", default_value = "default", hide_default_value = true)]
        tee: String,
        #[command(flatten)]
        at: BrokerAt,
    },
    /// Set a policy that releases resources
    SetResource {
        /// The Rego file
        file: PathBuf,
        /// repository, repository/type or repository/type/tag; the most specific one decides [default: all resources]
        #[arg(long, value_name = "SCOPE", default_value = "", hide_default_value = true)]
        scope: String,
        #[command(flatten)]
        at: BrokerAt,
    },
    /// Print the policy that appraises guests
    ShowAttestation {
        /// For this TEE, as in snp [default: all that have none of their own]
        #[arg(long, value_name = "TEE", default_value = "default", hide_default_value = true)]
        tee: String,
        #[command(flatten)]
        at: BrokerAt,
    },
    /// Run a policy on what a guest showed, and say line by line why it refuses; nothing is changed
    Test {
        /// What the guest showed: an attestation token (`nacre attest token`) or its claims, JSON
        #[arg(long, value_name = "FILE")]
        token: PathBuf,
        /// Whether it would get this secret, repository/type/tag; without it, how it would be appraised
        #[arg(long, value_name = "PATH")]
        resource: Option<String>,
        /// A Rego file [default: the policy that the broker has for it]
        #[arg(long, value_name = "FILE")]
        policy: Option<PathBuf>,
        /// Print JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        at: BrokerAt,
    },
    /// Remove a policy that releases resources of a scope: the next wider one decides
    RmResource {
        /// repository, repository/type or repository/type/tag
        #[arg(long, value_name = "SCOPE")]
        scope: String,
        #[command(flatten)]
        at: BrokerAt,
    },
    /// Print a policy that releases resources
    ShowResource {
        /// repository, repository/type or repository/type/tag [default: all resources]
        #[arg(long, value_name = "SCOPE", default_value = "", hide_default_value = true)]
        scope: String,
        #[command(flatten)]
        at: BrokerAt,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum ReferenceCommand {
    /// Set the values that are expected of something, in place of the old ones
    Set {
        /// What is expected, such as sim.measurement
        name: String,
        /// The values; what reads as a number is meant as one as well
        #[arg(required = true)]
        values: Vec<String>,
        /// Until when they are good, RFC 3339 [default: a year from now]
        #[arg(long, value_name = "TIME")]
        expires: Option<String>,
        #[command(flatten)]
        at: BrokerAt,
    },
    /// List all that is expected, until when, and who says so
    Ls {
        /// Print JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        at: BrokerAt,
    },
    /// Revoke what is expected of something: no value is good from now on
    Rm {
        /// What was expected, such as sim.measurement
        name: String,
        #[command(flatten)]
        at: BrokerAt,
    },
    /// Sign a document of values, for brokers that know the signer; prints it
    Sign {
        /// What is expected: NAME=VALUE; a name may be repeated
        #[arg(required = true, value_name = "NAME=VALUE")]
        values: Vec<String>,
        /// The signer's private key (EC P-256)
        #[arg(long, value_name = "FILE")]
        key: PathBuf,
        /// The signer's name, as brokers know it
        #[arg(long, value_name = "NAME")]
        issuer: String,
        /// A number that grows with each document of the signer's [default: the time]
        #[arg(long, value_name = "NUMBER")]
        serial: Option<u64>,
        /// Until when the values are good, RFC 3339
        #[arg(long, value_name = "TIME")]
        expires: String,
        /// A name whose values are good no more; may be repeated
        #[arg(long, value_name = "NAME")]
        revoke: Vec<String>,
    },
    /// Take a signed document of values, ours or a CoRIM
    Import {
        /// The document, or the CoRIM (COSE_Sign1); - is standard input
        file: PathBuf,
        #[command(flatten)]
        at: BrokerAt,
    },
    /// Who may sign documents of values
    #[command(subcommand)]
    Signer(SignerCommand),
    /// Print the values that are expected of something
    Show {
        /// What is expected, such as sim.measurement
        name: String,
        #[command(flatten)]
        at: BrokerAt,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum SignerCommand {
    /// Let somebody sign
    Add {
        /// Their name, as their documents have it
        name: String,
        /// Their public key, PEM (EC P-256)
        key: PathBuf,
        /// Only values whose names begin so
        #[arg(long, default_value = "")]
        prefix: String,
        #[command(flatten)]
        at: BrokerAt,
    },
    /// List who may sign
    Ls {
        /// Print JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        at: BrokerAt,
    },
    /// Let somebody sign no more
    Rm {
        /// Who
        name: String,
        /// Revoke everything that they signed, too
        #[arg(long)]
        values: bool,
        #[command(flatten)]
        at: BrokerAt,
    },
}
