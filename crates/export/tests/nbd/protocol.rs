//! Good and bad clients, by hand.

use std::sync::atomic::Ordering::SeqCst;

use nacre_core::BlockError;
use nacre_export::nbd::wire::{self, answer, command_flag, info as infos, option};
use nacre_testkit::Rng;

use crate::{
    Fixture,
    client::{Client, info, option_bytes, request},
    memory::Memory,
};

const READ: u16 = 0;
const WRITE: u16 = 1;
const DISCONNECT: u16 = 2;
const FLUSH: u16 = 3;
const TRIM: u16 = 4;
const CACHE: u16 = 5;
const ZEROES: u16 = 6;
const PERM: u32 = 1;
const IO: u32 = 5;
const INVALID: u32 = 22;
const NO_SPACE: u32 = 28;
const NOT_SUPPORTED: u32 = 95;

#[test]
fn options_are_answered_each_by_its_own() {
    let fixture = Fixture::with(Memory::new(1 << 20), |settings| settings.name = "disk".into());
    let mut client = Client::greeted(&fixture.socket());
    client.option(option::LIST, b"");
    assert_eq!(client.answer(option::LIST), (answer::SERVER, b"\0\0\0\x04disk".to_vec()));
    assert_eq!(client.answer(option::LIST).0, answer::ACK);
    for (asked, data, expected) in [
        (option::LIST, &b"x"[..], answer::INVALID),
        (option::STARTTLS, b"", answer::POLICY),
        (option::STARTTLS, b"x", answer::INVALID),
        (option::STRUCTURED_REPLY, b"x", answer::INVALID),
        (option::SET_META_CONTEXT, b"\0\0\0\0\0\0\0\0", answer::UNSUPPORTED),
        (option::LIST_META_CONTEXT, b"\0\0\0\0\0\0\0\0", answer::UNSUPPORTED),
        (option::INFO, b"", answer::INVALID),
        (option::GO, b"\xff\xff\xff\xff\0\0", answer::INVALID),
        (4, b"", answer::UNSUPPORTED),
        (11, b"", answer::UNSUPPORTED),
        (u32::MAX, &[7; 65536], answer::UNSUPPORTED),
        (option::INFO, &info(b"other", &[]), answer::UNKNOWN),
        (option::GO, &info(b"disk\0", &[]), answer::UNKNOWN),
    ] {
        client.option(asked, data);
        assert_eq!(client.answer(asked).0, expected, "option {asked}");
    }
    client.option(option::INFO, &info(b"disk", &[infos::BLOCK_SIZE, infos::NAME, infos::DESCRIPTION, 99]));
    let (_, export) = client.answer(option::INFO);
    assert_eq!(export[..10], [0, 0, 0, 0, 0, 0, 0, 0x10, 0, 0]);
    assert_eq!(u16::from_be_bytes([export[10], export[11]]) & wire::transmission::SEND_DF, 0, "nothing structured yet");
    assert_eq!(client.answer(option::INFO).1, b"\0\x01disk");
    assert_eq!(client.answer(option::INFO).1, b"\0\x03\0\0\0\x01\0\0\x10\0\x02\0\0\0");
    assert_eq!(client.answer(option::INFO).0, answer::ACK);
    client.option(option::ABORT, b"");
    assert_eq!(client.answer(option::ABORT).0, answer::ACK);
    assert!(client.is_closed());
}

#[test]
fn the_old_way_to_open_works_with_and_without_its_zeroes() {
    let fixture = Fixture::new(1 << 20);
    for (flags, zeroes) in [(3_u32, 0), (1, 124)] {
        let mut client = Client::connect(&fixture.socket());
        client.take::<18>();
        client.send(&flags.to_be_bytes());
        client.option(option::EXPORT_NAME, b"");
        assert_eq!(u64::from_be_bytes(client.take()), 1 << 20);
        client.take::<2>();
        for _ in 0..zeroes {
            assert_eq!(client.take::<1>(), [0]);
        }
        client.request(0, WRITE, 1, 4096, 4096, &[9; 4096]);
        assert_eq!(client.simple(0).error, 0);
        client.request(0, READ, 2, 4095, 3, &[]);
        let reply = client.simple(3);
        assert_eq!((reply.cookie, &reply.data[1..]), (2, &[9, 9][..]));
        client.request(0, READ, 3, 1 << 20, 1, &[]);
        assert_eq!(client.simple(0).error, INVALID);
        client.request(0, DISCONNECT, 4, 0, 0, &[]);
        assert!(client.is_closed());
    }
    let mut client = Client::greeted(&fixture.socket());
    client.option(option::EXPORT_NAME, b"other");
    assert!(client.is_closed());
}

#[test]
fn what_is_not_nbd_is_sent_away_and_others_are_served() {
    let fixture = Fixture::new(1 << 20);
    let bytes = |parts: &[&[u8]]| parts.concat();
    let flags = 3_u32.to_be_bytes();
    let long = |length: u32| bytes(&[&flags, b"IHAVEOPT", &7_u32.to_be_bytes(), &length.to_be_bytes()]);
    let many: Vec<u8> = (0..200).flat_map(|_| option_bytes(option::LIST_META_CONTEXT, b"")).collect();
    for hostile in [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(),
        u32::MAX.to_be_bytes().to_vec(),
        bytes(&[&flags, &[0; 16]]),
        long(u32::MAX),
        long(65537),
        bytes(&[&flags, &many]),
        bytes(&[&flags, &option_bytes(option::EXPORT_NAME, &[b'x'; 5000])]),
        bytes(&[&flags, &option_bytes(option::EXPORT_NAME, &[0xff; 5])]),
    ] {
        let mut client = Client::connect(&fixture.socket());
        client.send(&hostile);
        let _ = std::io::copy(&mut client.0, &mut std::io::sink());
    }
    for hostile in [vec![0; 28], vec![0xff; 4096], b"IHAVEOPT".repeat(8)] {
        let mut client = Client::open(&fixture.socket(), true);
        client.request(0, FLUSH, 1, 0, 0, &[]);
        client.send(&hostile);
        assert_eq!(client.reply().error, 0, "what came before is done");
        assert!(client.is_closed());
    }
    // Who goes in the middle of something.
    for part in [1, 27, 28, 1000] {
        let mut client = Client::open(&fixture.socket(), true);
        let write = bytes(&[&request(0, WRITE, 1, 0, 1 << 20), &[1; 1000]]);
        client.send(&write[..part]);
    }
    let mut client = Client::open(&fixture.socket(), true);
    assert_eq!(client.does(0, READ, 0, 4096, &[]).data, [0; 4096]);
}

#[test]
fn a_write_that_is_too_long_is_refused_and_ends_the_connection() {
    let fixture = Fixture::new(1 << 20);
    for length in [wire::MAX_PAYLOAD + 1, u32::MAX] {
        let mut client = Client::open(&fixture.socket(), true);
        client.request(0, WRITE, 1, 0, length, &[]);
        assert_eq!(client.reply().error, INVALID);
        assert!(client.is_closed());
    }
}

#[test]
fn each_wrong_request_has_its_error_and_the_connection_goes_on() {
    let fixture = Fixture::new(1 << 20);
    let mut client = Client::open(&fixture.socket(), true);
    let end = 1 << 20;
    for (flags, command, offset, length, expected) in [
        (0, READ, end, 1, INVALID),
        (0, READ, end - 1, 2, INVALID),
        (0, READ, u64::MAX, u32::MAX, INVALID),
        (0, READ, 0, 0, INVALID),
        (0, READ, 0, wire::MAX_PAYLOAD + 1, INVALID),
        (0, WRITE, end - 4096, 8192, NO_SPACE),
        (0, WRITE, u64::MAX, 8192, NO_SPACE),
        (0, WRITE, 0, 0, INVALID),
        (command_flag::DF, WRITE, 0, 4096, INVALID),
        (0x8000, WRITE, 0, 4096, INVALID),
        (0, TRIM, end, 4096, INVALID),
        (0, ZEROES, end, 4096, NO_SPACE),
        (0, ZEROES, 0, u32::MAX, NO_SPACE),
        (command_flag::FAST_ZERO, TRIM, 0, 4096, INVALID),
        (0, CACHE, 0, 4096, INVALID),
        (0, 7, 0, 4096, INVALID),
        (0, u16::MAX, 0, 4096, INVALID),
    ] {
        let data = vec![1; if command == WRITE { length as usize } else { 0 }];
        let error = client.tries(flags, command, offset, length, &data);
        assert_eq!(error, expected, "{flags:#x} {command} {offset} {length}");
    }
    assert_eq!(client.does(0, READ, 0, 1 << 20, &[]).data, vec![0; 1 << 20], "nothing was written");
}

#[test]
fn a_read_only_export_takes_no_writes() {
    let fixture = Fixture::with(Memory::new(1 << 20), |settings| settings.read_only = true);
    let mut client = Client::open(&fixture.socket(), true);
    for command in [WRITE, TRIM, ZEROES] {
        let data = vec![1; if command == WRITE { 100_000 } else { 0 }];
        assert_eq!(client.tries(0, command, 0, 100_000, &data), PERM);
    }
    assert_eq!(client.tries(0, FLUSH, 0, 0, &[]), 0);
    assert_eq!(client.does(0, READ, 0, 4096, &[]).data, [0; 4096]);
    assert_eq!(fixture.store.writes.load(SeqCst), 0);
}

#[test]
fn errors_of_the_store_are_those_of_the_protocol() {
    let fixture = Fixture::new(1 << 20);
    let mut client = Client::open(&fixture.socket(), true);
    let damage = BlockError::Integrity { first: 3, count: 1, what: "the tag does not match".into() };
    for (error, expected) in [
        (damage, IO),
        (BlockError::io("write", 0, 0, std::io::Error::other("x")), IO),
        (BlockError::NoSpace("full".into()), NO_SPACE),
        (BlockError::ReadOnly("a failure made it so".into()), PERM),
        (BlockError::Fenced("by another".into()), 108),
        (BlockError::Unsupported("no".into()), NOT_SUPPORTED),
    ] {
        *fixture.store.broken.lock().unwrap() = Some((12288..16384, error));
        assert_eq!(client.tries(0, WRITE, 12288, 4096, &[1; 4096]), expected);
        assert_eq!(client.tries(0, READ, 12800, 512, &[]), expected);
        // Of several in one batch, only that one.
        let batch: Vec<u8> = (0..8_u64)
            .flat_map(|at| [request(0, WRITE, at, at * 4096, 4096), vec![u8::try_from(at).unwrap(); 4096]].concat())
            .collect();
        client.send(&batch);
        for _ in 0..8 {
            let reply = client.reply();
            assert_eq!(reply.error, if reply.cookie == 3 { expected } else { 0 });
        }
    }
    let damage = BlockError::Integrity { first: 3, count: 1, what: "the tag does not match".into() };
    *fixture.store.broken.lock().unwrap() = Some((12288..16384, damage));
    let reply = client.does(0, READ, 8192, 16384, &[]);
    assert_eq!((reply.kind, reply.offset), (wire::chunk::ERROR_OFFSET, Some(12288)));
    assert!(String::from_utf8(reply.data).unwrap().contains("LBA 3"));
    fixture.store.flush_fails.store(true, SeqCst);
    assert_eq!(client.tries(0, FLUSH, 0, 0, &[]), IO);
    assert_eq!(client.tries(command_flag::FUA, WRITE, 0, 4096, &[1; 4096]), IO);
}

#[test]
fn fua_flushes_and_one_flush_is_for_all() {
    let fixture = Fixture::new(1 << 20);
    let mut client = Client::open(&fixture.socket(), true);
    assert_eq!(client.tries(0, WRITE, 0, 4096, &[1; 4096]), 0);
    assert_eq!(fixture.store.flushes.load(SeqCst), 0);
    for command in [WRITE, TRIM, ZEROES] {
        let before = fixture.store.flushes.load(SeqCst);
        let data = vec![1; if command == WRITE { 4096 } else { 0 }];
        assert_eq!(client.tries(command_flag::FUA, command, 0, 4096, &data), 0);
        assert_eq!(fixture.store.flushes.load(SeqCst), before + 1);
    }
    let before = fixture.store.flushes.load(SeqCst);
    assert_eq!(client.tries(command_flag::FUA, READ, 0, 4096, &[]), 0);
    assert_eq!(fixture.store.flushes.load(SeqCst), before);
    assert_eq!(client.tries(command_flag::FUA, FLUSH, 0, 0, &[]), 0);
    assert_eq!(fixture.store.flushes.load(SeqCst), before + 1);
}

#[test]
fn zeroes_and_trims_of_any_bytes_touch_only_these() {
    for fast in [false, true] {
        let fixture = Fixture::with(Memory::new(1 << 20), |settings| settings.fast_zeroes = fast);
        let mut client = Client::open(&fixture.socket(), true);
        let mut model = vec![7; 1 << 20];
        assert_eq!(client.tries(0, WRITE, 0, 1 << 20, &model), 0);
        let fast_zero = command_flag::FAST_ZERO;
        let expected = if fast { 0 } else { NOT_SUPPORTED };
        assert_eq!(client.tries(fast_zero, ZEROES, 4096, 8192, &[]), expected);
        if fast {
            model[4096..12288].fill(0);
        }
        assert_eq!(client.tries(fast_zero | command_flag::NO_HOLE, ZEROES, 0, 4096, &[]), NOT_SUPPORTED);
        for (flags, offset, length) in
            [(0, 20_000, 100), (0, 24_000, 10_000), (command_flag::NO_HOLE, 50_001, 9999), (0, 69_632, 4096)]
        {
            assert_eq!(client.tries(flags, ZEROES, offset, length, &[]), 0);
            let offset = usize::try_from(offset).unwrap();
            model[offset..offset + length as usize].fill(0);
        }
        assert_eq!(client.tries(0, TRIM, 100_000, 100, &[]), 0);
        assert_eq!(client.tries(0, TRIM, 110_000, 10_000, &[]), 0);
        assert_eq!(fixture.store.trimmed.load(SeqCst), 8192, "whole blocks only");
        model[110_592..118_784].fill(0);
        assert_eq!(client.does(0, READ, 0, 1 << 20, &[]).data, model);
    }
}

#[test]
fn requests_of_any_size_in_any_pieces_do_what_they_say() {
    for slow in [false, true] {
        let mut store = Memory::new(8 << 20);
        store.slow = slow;
        let fixture = Fixture::with(store, |_| {});
        let mut client = Client::open(&fixture.socket(), true);
        let mut sender = Client(client.0.try_clone().unwrap());
        let mut rng = Rng::new(7);
        let mut model = vec![0; 8 << 20];
        for round in 0..40 {
            // The requests of a round do not overlap, since they have no order: each is in its own part.
            let (mut bytes, mut expected) = (Vec::new(), Vec::new());
            for part in 0..16_usize {
                let limit = [64, 5000, 100_000, 500_000][rng.below(4)];
                let length = 1 + rng.below(limit);
                let align = [1, 512, 4096][rng.below(3)];
                let length = length.next_multiple_of(align).min(500_000);
                let offset = (part << 19) + rng.below((1 << 19) - length) / align * align;
                let (at, count) = (offset as u64, u32::try_from(length).unwrap());
                let place = &mut model[offset..offset + length];
                if rng.below(2) == 0 {
                    rng.fill(place);
                    bytes.extend(request(0, WRITE, part as u64, at, count));
                    bytes.extend(&*place);
                    expected.push(None);
                } else {
                    bytes.extend(request(0, READ, part as u64, at, count));
                    expected.push(Some(place.to_vec()));
                }
            }
            let step = [1000, 70_000, usize::MAX][round % 3];
            std::thread::scope(|scope| {
                scope.spawn(|| bytes.chunks(step).for_each(|piece| sender.send(piece)));
                for _ in 0..16 {
                    let reply = client.reply();
                    let expected = &expected[usize::try_from(reply.cookie).unwrap()];
                    assert_eq!(reply.error, 0);
                    assert!(reply.data == expected.as_deref().unwrap_or_default(), "round {round}");
                }
            });
        }
        assert!(client.does(0, READ, 0, 8 << 20, &[]).data == model);
        assert!(client.does(command_flag::DF, READ, 1, (8 << 20) - 1, &[]).data == model[1..]);
    }
}

#[test]
fn reads_that_come_together_go_to_the_store_together() {
    let fixture = Fixture::new(1 << 20);
    let mut client = Client::open(&fixture.socket(), true);
    let batch: Vec<u8> = (0..32).flat_map(|at| request(0, READ, at, at * 4096, 4096)).collect();
    client.send(&batch);
    for at in 0..32 {
        assert_eq!(client.reply().cookie, at);
    }
    assert_eq!(fixture.store.most_at_once.load(SeqCst), 32);
}
