//! `nacre image copy`: the shipping side.

use std::path::Path;

use anyhow::Context as _;
use nacre_core::{KeySource, KeySourceError, ResourceUri, SecretBytes, SystemClock};
use nacre_oci::{
    copy::{
        self, Copied, CopyOptions, EncryptLayers, ExistingSignatures, Platforms, Recompress, Remake, Sign, SigningKey,
        Source,
    },
    crypt::{Keyring, Recipients},
    manifest::{Compression, Index, Platform, verify_manifest},
    reference::{ImageRef, Location},
    registry::{Client, CredentialStore, RegistriesConf},
    source::ImageSource,
    transport::{open_sink, open_source},
    trust::{
        LookasideConfig, Policy, TrustContext,
        sign::{CosignKey, GpgKey},
    },
};
use serde_json::{Value, json};

use super::lazy;
use crate::{
    args::{CopyArgs, Global, SignArgs},
    exit::Usage,
    output,
    progress::size,
    setup::Setup,
};

pub(crate) fn copy(global: &Global, args: &CopyArgs) -> anyhow::Result<()> {
    let mut setup = Setup::new(global, args.json)?;
    setup.add_registry(&args.registry);
    let config = &setup.config;
    let (client, lookaside) = shipping(&setup, args.registries_d.as_deref())?;
    // What the arguments get wrong is said before anybody is asked for anything.
    let platforms = platforms(args, config.image.platform.as_deref())?;
    let compression = args.compression.as_deref().map(recompress).transpose()?;
    let keyring = Keyring::from_args(&args.decryption_key)?;
    let recipients = Recipients::from_args(&args.encrypt)?;
    let layers = match args.encrypt_layer.as_slice() {
        [] => EncryptLayers::All,
        some => EncryptLayers::Some(some.iter().copied().map(i64::from).collect()),
    };
    let signing = Signing::of(&args.sign)?;
    let source = open_source(&location(&args.source, &client)?, &client)?;
    let sink = open_sink(&location(&args.destination, &client)?, &client)?;
    let source = match &args.policy {
        Some(policy) => admitted(&*source, policy, &lookaside, &platforms)?,
        None => Source::without_policy(&*source)?,
    };

    let make_lazy = args.make_lazy.lazy.then(|| {
        let open = |text: &str| anyhow::Ok(open_source(&location(text, &client)?, &client)?);
        let platform = match &platforms {
            Platforms::One(platform) => platform.clone(),
            Platforms::Host | Platforms::All => Platform::host(),
        };
        lazy::remake(&args.make_lazy, &keyring, open, &platform)
    });
    let make_lazy = make_lazy.transpose()?;
    let options = CopyOptions {
        platforms,
        compression,
        decrypt: (!args.decryption_key.is_empty()).then_some(&keyring),
        encrypt: (!args.encrypt.is_empty()).then_some((&recipients, &layers)),
        remake: make_lazy.as_ref().map(|remake| -> &dyn Remake { remake }),
        signatures: if args.remove_signatures { ExistingSignatures::Remove } else { ExistingSignatures::Keep },
        sign: signing.sign(),
        lookaside: Some(&lookaside),
        progress: &*setup.progress,
        ..CopyOptions::default()
    };
    let copied = copy::copy(&source, &*sink, &options)?;
    if let Some(made) = &make_lazy {
        lazy::note(made, &*setup.progress);
    }
    report(args.json, &copied, make_lazy.as_ref().map(|made| ("lazy", lazy::reports(made))))
}

pub(super) fn location(text: &str, client: &Client) -> anyhow::Result<Location> {
    if Location::has_transport(text) {
        return Ok(text.parse()?);
    }
    let mut names = client.registries().candidates(text)?.into_iter();
    let name = names.next().with_context(|| format!("'{text}' names no image"))?;
    Ok(Location::Docker(name.with_default_tag()))
}

/// What the policy lets in: the image for the platform, or with `--all` the index.
pub(super) fn admitted<'a>(
    source: &'a dyn ImageSource,
    policy: &Path,
    lookaside: &LookasideConfig,
    platforms: &Platforms,
) -> anyhow::Result<Source<'a>> {
    let bytes = std::fs::read(policy).with_context(|| format!("{}: the trust policy", policy.display()))?;
    let policy = Policy::parse(&bytes, &policy.display().to_string())?;
    let mut chain = vec![source.manifest(None)?.peek().clone()];
    let platform = match platforms {
        Platforms::All => None,
        Platforms::One(platform) => Some(platform.clone()),
        Platforms::Host => Some(Platform::host()),
    };
    if let (Some(platform), [index]) = (platform, chain.as_slice())
        && index.is_index()
    {
        let child = Index::parse(index)?.choose(&platform)?.digest;
        chain.push(verify_manifest(source.manifest(Some(&child))?, &child)?.into_inner());
    }
    let context = TrustContext {
        policy: &policy,
        requested: source.location(),
        chain: &chain.iter().collect::<Vec<_>>(),
        storage: source.signatures(),
        lookaside,
        keys: &NoBroker,
        clock: &SystemClock,
    };
    Ok(Source::admitted(source, &context.evaluate()?)?)
}

struct NoBroker;

impl KeySource for NoBroker {
    fn fetch(&self, uri: &ResourceUri) -> Result<SecretBytes, KeySourceError> {
        let source = "copying asks no broker; name a key file in the policy".into();
        Err(KeySourceError::Failed { uri: uri.clone(), source_name: "a key broker".into(), source })
    }
}

/// `configured` is the platform of `--platform`, or else of the configuration.
fn platforms(args: &CopyArgs, configured: Option<&str>) -> anyhow::Result<Platforms> {
    if args.all && args.registry.platform.is_some() {
        return Err(Usage("--all and --platform are both given; choose one".into()).into());
    }
    Ok(match configured {
        _ if args.all => Platforms::All,
        Some(platform) => Platforms::One(platform.parse()?),
        None => Platforms::Host,
    })
}

fn recompress(text: &str) -> anyhow::Result<Recompress> {
    let to = match text {
        "gzip" => Compression::Gzip,
        "zstd" => Compression::Zstd,
        "none" => Compression::None,
        _ => return Err(Usage(format!("--compression '{text}': gzip, zstd and none are known")).into()),
    };
    Ok(Recompress { to, level: None })
}

/// How registries are spoken to by who ships images, and where their signatures are.
pub(super) fn shipping(setup: &Setup, registries_d: Option<&Path>) -> anyhow::Result<(Client, LookasideConfig)> {
    let config = &setup.config;
    let client = Client::new(
        config.registry.clone(),
        RegistriesConf::system(config.registries.conf.as_deref())?,
        CredentialStore::system(config.registries.credentials.as_deref().map(Path::new))?,
        setup.progress.clone(),
    )?;
    let configured = || config.trust.registries_d.clone().or_else(crate::setup::registries_d);
    let lookaside = match registries_d.map(Path::to_owned).or_else(configured) {
        Some(dir) => LookasideConfig::load_dir(&dir)?,
        None => LookasideConfig::default(),
    };
    Ok((client, lookaside))
}

pub(super) enum OwnedKey {
    Cosign(CosignKey),
    Gpg(Box<GpgKey>),
}

impl OwnedKey {
    pub(super) fn as_signing(&self, bundle: bool) -> SigningKey<'_> {
        match self {
            Self::Cosign(key) if bundle => SigningKey::Bundle(key),
            Self::Cosign(key) => SigningKey::Cosign(key),
            Self::Gpg(key) => SigningKey::Gpg(key),
        }
    }
}

/// Who signs what is written, as the arguments say.
pub(super) struct Signing {
    keys: Vec<OwnedKey>,
    bundle: bool,
    identity: Option<ImageRef>,
}

impl Signing {
    pub(super) fn of(args: &SignArgs) -> anyhow::Result<Self> {
        let identity = args.sign_identity.as_deref().map(str::parse::<ImageRef>).transpose()?;
        Ok(Self { keys: signing_keys(args)?, bundle: args.sign_bundle, identity })
    }

    /// `None`: nobody.
    pub(super) fn sign(&self) -> Option<Sign<'_>> {
        let keys = self.keys.iter().map(|key| key.as_signing(self.bundle)).collect();
        (!self.keys.is_empty()).then(|| Sign { keys, identity: self.identity.clone() })
    }
}

fn signing_keys(args: &SignArgs) -> anyhow::Result<Vec<OwnedKey>> {
    let passphrase = args.sign_passphrase_file.as_deref().map(first_line).transpose()?;
    let read = |path: &str| {
        let bytes = std::fs::read(path).with_context(|| format!("{path}: the signing key"))?;
        anyhow::Ok(SecretBytes::new(bytes))
    };
    let key = |text: &String| match text.strip_prefix("gpg:") {
        Some(path) => {
            let key = GpgKey::read(read(path)?.expose(), None, passphrase.as_ref());
            Ok(OwnedKey::Gpg(Box::new(key.with_context(|| format!("{path}: the signing key"))?)))
        }
        None => {
            let key = CosignKey::from_pem(read(text)?.expose(), passphrase.as_ref());
            Ok(OwnedKey::Cosign(key.with_context(|| format!("{text}: the signing key"))?))
        }
    };
    args.sign.iter().map(key).collect()
}

fn first_line(path: &Path) -> anyhow::Result<SecretBytes> {
    let bytes = SecretBytes::new(std::fs::read(path).with_context(|| format!("{}: the passphrase", path.display()))?);
    let line = bytes.expose().split(|byte| *byte == b'\n').next().unwrap_or_default();
    Ok(SecretBytes::new(line.to_vec()))
}

/// Prints what was written, with a field more where there is something to add.
pub(super) fn report(json: bool, copied: &Copied, more: Option<(&str, Value)>) -> anyhow::Result<()> {
    if !json {
        return Ok(output::line(copied.digest)?);
    }
    let layers = |image: &copy::CopiedImage| {
        let layer = |layer: &copy::CopiedLayer| {
            json!({
                "from": layer.from, "to": layer.to, "size": layer.size, "bytes": size(layer.size),
                "media_type": layer.media_type, "reused": layer.reused,
            })
        };
        image.layers.iter().map(layer).collect::<Vec<_>>()
    };
    let image = |image: &copy::CopiedImage| {
        let platform = image.platform.as_ref().map(ToString::to_string);
        json!({ "from": image.from, "to": image.to, "platform": platform, "layers": layers(image) })
    };
    let mut all = json!({
        "digest": copied.digest,
        "media_type": copied.media_type,
        "changed": copied.changed,
        "images": copied.images.iter().map(image).collect::<Vec<_>>(),
        "signatures_kept": copied.signatures_kept,
        "signatures_made": copied.signatures_made,
    });
    if let (Some((name, value)), Some(fields)) = (more, all.as_object_mut()) {
        fields.insert(name.into(), value);
    }
    output::json(&all)
}
