//! Clients that are not ours, of a store in memory and of a secure disk.

use std::{fs, process::Command, sync::Arc};

use nacre_core::BlockStore;
use nacre_export::nbd::{Listen, NbdSettings};
use nacre_testkit::{Rng, require, run};

use crate::{Fixture, disk, memory::Memory};

/// A secure disk of less does not exist.
const SMALLEST: u64 = nacre_disk::SMALLEST;

/// Does it with each kind of store.
fn each(size: u64, change: impl Fn(&mut NbdSettings), test: impl Fn(&Fixture<dyn BlockStore>)) {
    let mut slow = Memory::new(size);
    slow.slow = true;
    let stores: [Arc<dyn BlockStore>; 3] = [Arc::new(Memory::new(size)), Arc::new(slow), disk::fresh(size)];
    for store in stores {
        test(&Fixture::of(store.clone(), store, &change));
    }
}

#[test]
fn nbdinfo_finds_the_export_and_what_it_can_do() {
    let Some(nbdinfo) = require("nbdinfo") else { return };
    let fixture = Fixture::with(Memory::new(64 << 20), |settings| settings.name = "disk".into());
    for arguments in [vec!["--json"], vec!["--json", "--list"]] {
        let out = run(Command::new(&nbdinfo).args(&arguments).arg(fixture.uri())).stdout;
        let out = String::from_utf8(out).unwrap();
        for line in [
            "\"protocol\": \"newstyle-fixed\"",
            "\"structured\": true",
            "\"export-name\": \"disk\"",
            "\"export-size\": 67108864",
            "\"is_read_only\": false",
            "\"can_cache\": false",
            "\"can_df\": true",
            "\"can_flush\": true",
            "\"can_fua\": true",
            "\"can_multi_conn\": true",
            "\"can_trim\": true",
            "\"can_zero\": true",
            "\"block_size_minimum\": 1",
            "\"block_size_preferred\": 4096",
            "\"block_size_maximum\": 33554432",
        ] {
            assert!(out.contains(line), "{line} is not in {out}");
        }
    }
    let wrong = fixture.uri().replace("disk", "other");
    let refused = Command::new(&nbdinfo).arg(wrong).output().unwrap();
    assert!(String::from_utf8_lossy(&refused.stderr).contains("other"));
}

#[test]
fn nbdcopy_gets_back_what_it_brought_over_many_connections() {
    let Some(nbdcopy) = require("nbdcopy") else { return };
    let tcp = |settings: &mut NbdSettings| settings.listen.push(Listen::Tcp("127.0.0.1:0".parse().unwrap()));
    each(32 << 20, tcp, |fixture| {
        let devices = fixture.server().devices().to_vec();
        let (there, back) = (fixture.directory.path().join("there"), fixture.directory.path().join("back"));
        fs::write(&there, Rng::new(5).bytes(32 << 20)).unwrap();
        let options = ["--connections=4", "--requests=16", "--flush"];
        run(Command::new(&nbdcopy).args(options).arg(&there).arg(&devices[0]));
        run(Command::new(&nbdcopy).args(options).arg(&devices[1]).arg(&back));
        assert!(fs::read(&there).unwrap() == fs::read(&back).unwrap());
    });
}

#[test]
fn qemu_img_converts_and_compares() {
    let Some(qemu) = require("qemu-img") else { return };
    each(
        32 << 20,
        |_| {},
        |fixture| {
            let image = fixture.directory.path().join("image.raw");
            let mut data = vec![0; 32 << 20];
            Rng::new(9).fill(&mut data[(5 << 20)..(9 << 20) + 512]);
            fs::write(&image, &data).unwrap();
            let nbd = format!("nbd:unix:{}", fixture.socket().display());
            let info = run(Command::new(&qemu).args(["info", &nbd])).stdout;
            assert!(String::from_utf8_lossy(&info).contains("virtual size: 32 MiB"));
            let convert = ["convert", "-n", "-f", "raw", "-O", "raw"];
            run(Command::new(&qemu).args(convert).arg(&image).arg(&nbd));
            run(Command::new(&qemu).args(["compare", "-f", "raw", "-F", "raw"]).arg(&image).arg(&nbd));
            let back = fixture.directory.path().join("back.qcow2");
            run(Command::new(&qemu).args(["convert", "-f", "raw", "-O", "qcow2", "-W", "-m", "16", &nbd]).arg(&back));
            run(Command::new(&qemu).args(["compare", "-f", "qcow2", "-F", "raw"]).arg(&back).arg(&image));
        },
    );
}

#[test]
fn qemu_io_writes_parts_of_blocks_zeroes_and_trims() {
    let Some(qemu) = require("qemu-io") else { return };
    each(
        SMALLEST,
        |_| {},
        |fixture| {
            let nbd = format!("nbd:unix:{}", fixture.socket().display());
            let out = run(Command::new(&qemu).args(["-f", "raw"]).arg(&nbd).args([
                "-c",
                "write -P 1 0 1M",
                "-c",
                "write -P 2 -f 513 5000",
                "-c",
                "write -z 20000 9000",
                "-c",
                "write -z -u 40000 9000",
                "-c",
                "discard 65536 65536",
                "-c",
                "flush",
                "-c",
                "read -P 1 0 513",
                "-c",
                "read -P 2 513 5000",
                "-c",
                "read -P 1 5513 14487",
                "-c",
                "read -P 0 20000 9000",
                "-c",
                "read -P 1 29000 11000",
                "-c",
                "read -P 0 40000 9000",
                "-c",
                "read -P 0 65536 65536",
                "-c",
                "read -P 1 131072 917504",
            ]));
            let out = String::from_utf8_lossy(&out.stdout);
            assert!(!out.contains("failed"), "{out}");
        },
    );
}

#[test]
fn fio_verifies_what_it_wrote() {
    let Some(fio) = require("fio") else { return };
    each(
        32 << 20,
        |_| {},
        |fixture| {
            for (kind, sizes) in [("randwrite", "512-128k"), ("randrw", "4k-4k"), ("write", "256k-256k")] {
                let out =
                    run(Command::new(&fio).args(["--name=x", "--ioengine=nbd", "--size=32m", "--iodepth=32"]).args([
                        &format!("--uri={}", fixture.uri()),
                        &format!("--rw={kind}"),
                        &format!("--bsrange={sizes}"),
                        "--verify=crc32c",
                        "--verify_fatal=1",
                        "--fsync=64",
                    ]));
                assert!(!String::from_utf8_lossy(&out.stderr).contains("verify:"));
            }
        },
    );
}

#[test]
fn a_read_only_export_is_one_for_others_too() {
    let Some(nbdinfo) = require("nbdinfo") else { return };
    let fixture = Fixture::with(Memory::new(1 << 20), |settings| settings.read_only = true);
    run(Command::new(&nbdinfo).args(["--is", "read-only"]).arg(fixture.uri()));
    assert!(!Command::new(&nbdinfo).args(["--can", "trim"]).arg(fixture.uri()).status().unwrap().success());
}
