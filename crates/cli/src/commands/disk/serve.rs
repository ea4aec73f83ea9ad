//! `nacre disk serve`: a disk over NBD, in the foreground.

use std::path::Path;

use anyhow::Context as _;
use nacre_export::{
    Served,
    nbd::{Listen, NbdServer, NbdSettings, Tls},
};

use super::run::{self, Started};
use crate::{
    args::{Global, disk::ServeArgs},
    exit::Usage,
    output,
};

/// The most bytes of a PEM file.
const PEM_LIMIT: u64 = 1 << 20;

pub(super) fn serve(global: &Global, args: &ServeArgs) -> anyhow::Result<()> {
    let settings = settings(args)?;
    let start = |store: Served, _: &_| {
        let server = NbdServer::start(store, settings)?;
        let devices = server.devices().to_vec();
        // Clients come again where they find a server: nobody keeps a server from ending.
        Ok(Started { front_end: Box::new(server), devices, users: |_| Vec::new() })
    };
    run::run(global, &args.store, &args.disk, start, |devices, _| {
        devices.iter().try_for_each(|device| Ok(output::line(format_args!("serving at {device}"))?))
    })
}

fn settings(args: &ServeArgs) -> anyhow::Result<NbdSettings> {
    let tls = match (&args.tls_cert, &args.tls_key) {
        (Some(certificate), Some(key)) => {
            let authorities = args.tls_client_ca.as_deref().map(pem).transpose()?;
            Some(Tls::from_pem(&pem(certificate)?, &pem(key)?, authorities.as_deref())?)
        }
        _ => None,
    };
    if tls.is_none() && !args.listen.is_empty() && !args.insecure_tcp {
        let text = "--listen without TLS lets everybody on the way read and write the disk: give --tls-cert and --tls-key, or \
                    --insecure-tcp";
        return Err(Usage(text.into()).into());
    }
    let sockets = args.socket.iter().map(std::path::absolute).collect::<Result<Vec<_>, _>>()?;
    let tcp = args.listen.iter().copied().map(Listen::Tcp);
    let listen: Vec<Listen> = sockets.into_iter().map(Listen::Unix).chain(tcp).collect();
    let first = listen.first().cloned().context("the command line asks for an address")?;
    Ok(NbdSettings {
        listen,
        name: args.name.clone(),
        read_only: args.disk.read_only,
        fast_zeroes: true,
        tls,
        max_connections: args.max_clients,
        ..NbdSettings::new(first)
    })
}

fn pem(path: &Path) -> anyhow::Result<Vec<u8>> {
    use std::io::Read as _;
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).with_context(|| format!("{}: PEM", path.display()))?;
    file.take(PEM_LIMIT).read_to_end(&mut bytes).with_context(|| format!("{}: PEM", path.display()))?;
    Ok(bytes)
}
