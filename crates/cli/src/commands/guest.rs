//! `nacre guest`: calls to the guest's daemon.

use std::io::Write as _;

use anyhow::Context as _;
use nacre_guest::services::ServicesClient;

use crate::{args::GuestCommand, output};

pub(crate) fn guest(command: &GuestCommand) -> anyhow::Result<()> {
    match command {
        GuestCommand::Pull { image, bundle, at } => {
            let client = ServicesClient::connect(&at.socket)?;
            // The daemon is in another directory.
            let bundle = bundle.as_deref().map(std::path::absolute).transpose().context("--bundle")?;
            Ok(output::line(client.pull_image(image, bundle.as_deref())?)?)
        }
        GuestCommand::Resource { uri, at } => {
            let resource = ServicesClient::connect(&at.socket)?.resource(uri)?;
            let mut out = std::io::stdout().lock();
            out.write_all(resource.expose()).and_then(|()| out.flush()).context("write to standard output")
        }
    }
}
