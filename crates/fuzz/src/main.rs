//! Writes the seeds of all targets to a directory: what a libFuzzer run begins with.

use std::{env, fs, io, path::PathBuf};

fn main() -> io::Result<()> {
    let Some(directory) = env::args_os().nth(1).map(PathBuf::from) else {
        return Err(io::Error::other("usage: nacre-fuzz CORPUS-DIRECTORY"));
    };
    for target in nacre_fuzz::TARGETS {
        let place = directory.join(target.name);
        fs::create_dir_all(&place)?;
        for (number, seed) in (target.seeds)().iter().enumerate() {
            fs::write(place.join(format!("seed-{number:03}")), seed)?;
        }
    }
    Ok(())
}
