//! The configuration file, one for `nacre` and `nacre-guestd` (docs/guide/guest.md). Unknown keys are refused: a misspelt setting
//! of a security tool must not be a silent default.

use std::path::PathBuf;

use nacre_attest::initdata::InitData;
use nacre_oci::{
    registry::ClientConfig,
    trust::AdmissionRules,
    unpack::{DevicePolicy, Limits},
};
use serde::Deserialize;

use crate::lazy::{CACHE_LIMIT, Front, PATIENCE};

/// The entry of the init data that holds a guest's configuration.
pub const INIT_DATA_ENTRY: &str = "nacre.toml";
/// The most bytes of a configuration file.
const CONFIG_LIMIT: usize = 1 << 20;
/// The most bytes of a file of init data.
const INIT_DATA_LIMIT: usize = 4 << 20;

/// The configuration.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The image store.
    pub root: Option<PathBuf>,
    /// Whether the store may lie in memory.
    pub allow_tmpfs: bool,
    /// What an image must bring to be trusted.
    pub trust: TrustConfig,
    /// Pulling and unpacking.
    pub image: ImageConfig,
    /// Lazy images.
    pub lazy: LazyConfig,
    /// How registries are talked to.
    pub registry: ClientConfig,
    /// Where the registry's credentials and names are configured.
    pub registries: RegistriesConfig,
    /// The key broker.
    pub broker: Option<BrokerConfig>,
    /// Keys in files in place of a broker, as Trustee's `offline_fs_kbc` reads them: the directory of the two files.
    pub offline_keys: Option<PathBuf>,
    /// Private keys for encrypted layers, as `--decryption-key` spells them.
    pub decryption_keys: Vec<String>,
}

/// What an image must bring to be trusted.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrustConfig {
    /// policy.json: a file, a `kbs://` resource, or `init-data:NAME`.
    pub policy: Option<String>,
    /// Use no policy at all.
    pub insecure_policy: bool,
    /// Which of the four kinds of image may run.
    pub admission: AdmissionRules,
    /// Judge validity periods by the machine's clock: on machines of one's own. In a guest that clock is the host's, and what has a
    /// validity period is refused until a broker has signed a time.
    pub system_clock: bool,
    /// The directory of registries.d.
    pub registries_d: Option<PathBuf>,
}

/// Pulling and unpacking.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ImageConfig {
    /// How many layers are in flight at once.
    pub parallel_layers: usize,
    /// `os/architecture[/variant]`.
    pub platform: Option<String>,
    /// What happens with device nodes of a layer.
    pub devices: DevicePolicy,
    /// How much a layer may be.
    pub limits: Limits,
}

impl Default for ImageConfig {
    fn default() -> Self {
        Self { parallel_layers: 4, platform: None, devices: DevicePolicy::default(), limits: Limits::default() }
    }
}

/// How lazy images are read.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LazyConfig {
    /// For the ciphertext that was read; it may be shared and is not trusted. Default: `lazy/chunks` in the store.
    pub cache: Option<PathBuf>,
    /// The most bytes that are kept there.
    pub cache_limit: u64,
    /// How many seconds a read waits for a source that fails.
    pub patience: u64,
    /// The most bytes a second that are fetched; 0: as many as there are to be had.
    pub bandwidth: u64,
    /// How images become filesystems.
    pub front: Front,
}

impl Default for LazyConfig {
    fn default() -> Self {
        Self { cache: None, cache_limit: CACHE_LIMIT, patience: PATIENCE.as_secs(), bandwidth: 0, front: Front::Best }
    }
}

/// Names and credentials of registries.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RegistriesConfig {
    /// registries.conf.
    pub conf: Option<PathBuf>,
    /// auth.json: a file or a `kbs://` resource.
    pub credentials: Option<String>,
}

/// The key broker, and what this guest shows to it.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BrokerConfig {
    /// Its address.
    pub url: String,
    /// Its TLS certificate, pinned: PEM, or a file's name.
    pub certificate: Option<String>,
    /// The public key that signs its tokens: PEM, or a file's name.
    pub token_key: Option<String>,
    /// Which TEE this is: `snp`, `tdx`, `sgx`, `tpm`, `sim` or `sample`; what is there, where it is left out.
    pub tee: Option<String>,
    /// The platform key of the simulated TEE, a file: where there is no TEE.
    pub sim_platform_key: Option<PathBuf>,
    /// The TPM, where that is the TEE: a device, swtpm's socket, or `host:port`.
    pub tpm: Option<String>,
    /// The TPM's attestation key: a persistent handle; a primary key of the endorsement hierarchy, where it is left out.
    pub tpm_ak: Option<String>,
    /// The directory of the event log, which has to end with the TEE's registers. A simulated TEE has one only where this is set.
    pub events: Option<PathBuf>,
    /// The guest's init data, a file, which the evidence binds.
    pub init_data: Option<PathBuf>,
    /// A guest that runs on attests anew after so many seconds each time; 0: when it needs to.
    #[serde(default)]
    pub reattest: u64,
    /// The same as they were when the configuration was taken from them. The file is not read again: what the evidence binds has to be
    /// what the guest works by, whatever the file says meanwhile.
    #[serde(skip)]
    pub measured: Option<InitData>,
}

impl BrokerConfig {
    /// A broker at an address, and nothing else known.
    pub fn new(url: &str) -> Self {
        Self {
            url: url.into(),
            certificate: None,
            token_key: None,
            tee: None,
            sim_platform_key: None,
            tpm: None,
            tpm_ak: None,
            events: None,
            init_data: None,
            reattest: 0,
            measured: None,
        }
    }
}

/// Why a configuration is none.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It cannot be read.
    #[error("{path}: read the configuration: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// It does not parse.
    #[error("{name}: {reason}")]
    Parse {
        /// The file.
        name: String,
        /// What is wrong, and where.
        reason: String,
    },
}

impl Config {
    /// Parses a configuration; `name` is for messages.
    ///
    /// # Errors
    /// [`ConfigError::Parse`]
    pub fn parse(bytes: &[u8], name: &str) -> Result<Self, ConfigError> {
        let wrong = |reason: String| ConfigError::Parse { name: name.into(), reason };
        if bytes.len() > CONFIG_LIMIT {
            return Err(wrong(format!("{} bytes; at most {CONFIG_LIMIT} are allowed", bytes.len())));
        }
        let text = std::str::from_utf8(bytes).map_err(|error| wrong(error.to_string()))?;
        toml::from_str(text).map_err(|error| wrong(error.to_string()))
    }

    /// The configuration that a guest's init data carry as `nacre.toml`: measured, so that a host which changes it changes the
    /// evidence. `path` is the init data's file.
    ///
    /// # Errors
    /// [`ConfigError`]
    pub fn from_init_data(path: &std::path::Path) -> Result<Self, ConfigError> {
        let name = format!("{}: {INIT_DATA_ENTRY}", path.display());
        let wrong = |reason: String| ConfigError::Parse { name: name.clone(), reason };
        let bytes = read_limited(path, INIT_DATA_LIMIT)?;
        let text = String::from_utf8(bytes).map_err(|error| wrong(error.to_string()))?;
        let data = InitData::parse(&text).map_err(|error| wrong(error.to_string()))?;
        let toml = data.get(INIT_DATA_ENTRY).ok_or_else(|| wrong("the init data have no such entry".into()))?;
        let mut config = Self::parse(toml.as_bytes(), &name)?;
        if let Some(broker) = &mut config.broker {
            broker.init_data = Some(path.into());
            broker.measured = Some(data);
        }
        Ok(config)
    }

    /// Reads a configuration file.
    ///
    /// # Errors
    /// [`ConfigError`]
    pub fn read(path: &std::path::Path) -> Result<Self, ConfigError> {
        let bytes = read_limited(path, CONFIG_LIMIT)?;
        Self::parse(&bytes, &path.display().to_string())
    }
}

/// Reads a file up to one byte beyond a limit, for the parser to refuse.
fn read_limited(path: &std::path::Path, limit: usize) -> Result<Vec<u8>, ConfigError> {
    use std::io::Read as _;
    let wrong = |source| ConfigError::Read { path: path.into(), source };
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).map_err(wrong)?;
    file.take(limit as u64 + 1).read_to_end(&mut bytes).map_err(wrong)?;
    if bytes.len() > limit {
        return Err(wrong(std::io::Error::other(format!("larger than {limit} bytes"))));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_misspelt_setting_is_no_silent_default() {
        let config =
            Config::parse(b"[trust.admission]\nplain_signed = false\n[image.limits]\nentries = 5\n", "x").unwrap();
        assert!(!config.trust.admission.plain_signed && config.trust.admission.encrypted_unsigned);
        assert_eq!(config.image.limits.entries, 5);
        for bad in [
            "rot = '/x'",
            "[trust]\npolcy = 'x'",
            "[trust.admission]\nplain = true",
            "[broker]\nurl = 'x'\ncert = ''",
            "\u{0}",
        ] {
            let error = Config::parse(bad.as_bytes(), "nacre.toml").unwrap_err();
            assert!(error.to_string().starts_with("nacre.toml"), "{error}");
        }
        assert!(Config::parse(&[0xff], "x").is_err());
    }

    #[test]
    fn what_the_guest_works_by_is_what_its_evidence_binds() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("initdata.toml");
        let toml = "[broker]\nurl = \"https://b.example\"\n".to_owned();
        let data = InitData::new(nacre_core::Algorithm::Sha256, [(INIT_DATA_ENTRY.to_owned(), toml)].into()).unwrap();
        std::fs::write(&path, data.text()).unwrap();
        let config = Config::from_init_data(&path).unwrap();
        // The host exchanges the file once it was read.
        std::fs::write(&path, "other").unwrap();
        let service = crate::service::init_data_of(config.broker.as_ref().unwrap()).unwrap();
        assert_eq!(service.unwrap().digest(), data.digest());
    }

    #[test]
    fn an_endless_file_is_not_read_to_its_end() {
        let zero = std::path::Path::new("/dev/zero");
        assert!(Config::read(zero).unwrap_err().to_string().contains("larger"));
        assert!(Config::from_init_data(zero).unwrap_err().to_string().contains("larger"));
    }
}
