//! Tests of payload unpacking: each compression as the kernel's build writes it, and damage.

use std::io::Write;

use super::*;
use crate::bzimage::tests::wrap;

/// An ELF-like file that compresses, with runs of x86 calls for the branch filter to work on.
fn kernel() -> Vec<u8> {
    let mut bytes = ELF_MAGIC.to_vec();
    for i in 0..6_000u32 {
        bytes.extend_from_slice(&[0xe8, (i * 7) as u8, (i >> 3) as u8, 0, 0]);
        bytes.extend_from_slice(&(i / 5).to_le_bytes());
    }
    bytes
}

/// A payload as `size_append` of the kernel's build leaves it.
fn sized(mut compressed: Vec<u8>, plain: &[u8]) -> Vec<u8> {
    compressed.extend_from_slice(&(plain.len() as u32).to_le_bytes());
    compressed
}

fn gzip(plain: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    encoder.write_all(plain).unwrap();
    encoder.finish().unwrap()
}

fn xz_with_branch_filter(plain: &[u8]) -> Vec<u8> {
    let options = liblzma::stream::LzmaOptions::new_preset(6).unwrap();
    let mut filters = liblzma::stream::Filters::new();
    filters.x86().lzma2(&options);
    let stream =
        liblzma::stream::Stream::new_stream_encoder(&filters, liblzma::stream::Check::Crc32)
            .unwrap();
    let mut encoder = liblzma::write::XzEncoder::new_stream(Vec::new(), stream);
    encoder.write_all(plain).unwrap();
    sized(encoder.finish().unwrap(), plain)
}

fn lzma(plain: &[u8]) -> Vec<u8> {
    let options = liblzma::stream::LzmaOptions::new_preset(6).unwrap();
    let stream = liblzma::stream::Stream::new_lzma_encoder(&options).unwrap();
    let mut encoder = liblzma::write::XzEncoder::new_stream(Vec::new(), stream);
    encoder.write_all(plain).unwrap();
    sized(encoder.finish().unwrap(), plain)
}

fn zstd(plain: &[u8]) -> Vec<u8> {
    sized(::zstd::stream::encode_all(plain, 10).unwrap(), plain)
}

fn bzip2(plain: &[u8]) -> Vec<u8> {
    let mut encoder = ::bzip2::write::BzEncoder::new(Vec::new(), ::bzip2::Compression::best());
    encoder.write_all(plain).unwrap();
    sized(encoder.finish().unwrap(), plain)
}

fn lz4(plain: &[u8], block: usize) -> Vec<u8> {
    let mut out = LZ4_LEGACY_MAGIC.to_vec();
    for chunk in plain.chunks(block) {
        let compressed = lz4_flex::block::compress(chunk);
        out.extend_from_slice(&(compressed.len() as u32).to_le_bytes());
        out.extend_from_slice(&compressed);
    }
    sized(out, plain)
}

/// What `lzop -9` 1.04 wrote for [`LZOP_PLAIN`].
const LZOP_FILE: [u8; 72] = [
    0x89, 0x4c, 0x5a, 0x4f, 0x00, 0x0d, 0x0a, 0x1a, 0x0a, 0x10, 0x40, 0x20, 0xa0, 0x09, 0x40, 0x03,
    0x09, 0x03, 0x00, 0x00, 0x0d, 0x00, 0x00, 0x81, 0xa4, 0x6b, 0x03, 0xd7, 0xbf, 0x00, 0x00, 0x00,
    0x00, 0x00, 0x39, 0xf3, 0x04, 0x9f, 0x00, 0x00, 0x00, 0x40, 0x00, 0x00, 0x00, 0x12, 0xec, 0x0d,
    0x17, 0x5f, 0x1b, 0x7f, 0x45, 0x4c, 0x46, 0x20, 0x68, 0x65, 0x6c, 0x6c, 0x6f, 0x20, 0x15, 0x14,
    0x00, 0x11, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
];
const LZOP_PLAIN: &[u8] = b"\x7fELF hello hello hello hello hello hello hello hello hello hello";

fn payloads() -> Vec<(Compression, Vec<u8>, Vec<u8>)> {
    let plain = kernel();
    let all = |f: fn(&[u8]) -> Vec<u8>| (f(&plain), plain.clone());
    let named = [
        (Compression::Gzip, all(gzip)),
        (Compression::Xz, all(xz_with_branch_filter)),
        (Compression::Zstd, all(zstd)),
        (Compression::Bzip2, all(bzip2)),
        (Compression::Lzma, all(lzma)),
        (Compression::Lz4, all(|plain| lz4(plain, LZ4_LEGACY_BLOCK))),
        (Compression::Lz4, all(|plain| lz4(plain, 10_000))),
        (
            Compression::Lzo,
            (sized(LZOP_FILE.to_vec(), LZOP_PLAIN), LZOP_PLAIN.to_vec()),
        ),
        (Compression::None, (plain.clone(), plain.clone())),
    ];
    named.into_iter().map(|(c, (p, k))| (c, p, k)).collect()
}

#[test]
fn every_compression_of_the_kernel_build_is_unpacked() {
    for (compression, payload, plain) in payloads() {
        assert_eq!(Compression::detect(&payload), Some(compression));
        let unpacked = unpack(&wrap(&payload, "6.1.0"), MAX_VMLINUX)
            .unwrap_or_else(|error| panic!("{compression}: {error:?}"));
        assert!(unpacked == plain, "{compression}: other bytes came out");
    }
}

#[test]
fn a_payload_cut_anywhere_is_refused() {
    for (compression, payload, _) in payloads() {
        if compression == Compression::None {
            continue;
        }
        for cut in [5, 8, payload.len() / 2, payload.len() - 9] {
            let result = unpack(&wrap(&payload[..cut], "6.1.0"), MAX_VMLINUX);
            assert!(
                result.is_err(),
                "{compression}: {cut} bytes of {} gave a kernel",
                payload.len()
            );
        }
    }
}

#[test]
fn a_payload_with_a_wrong_size_is_refused() {
    for (compression, mut payload, plain) in payloads() {
        if compression == Compression::None {
            continue;
        }
        for wrong in [0, plain.len() as u32 - 1, plain.len() as u32 + 1] {
            let at = payload.len() - 4;
            payload[at..].copy_from_slice(&wrong.to_le_bytes());
            let result = unpack(&wrap(&payload, "6.1.0"), MAX_VMLINUX);
            assert!(result.is_err(), "{compression}: size {wrong} was believed");
        }
    }
}

#[test]
fn nothing_beyond_the_limit_comes_out() {
    for (compression, payload, plain) in payloads() {
        let mut out = Vec::new();
        let limit = plain.len() as u64 - 1;
        let result = unpack_into(&wrap(&payload, "6.1.0"), &mut out, limit);
        assert!(
            matches!(result, Err(PayloadError::TooLarge { .. })),
            "{compression}: {result:?}"
        );
        assert!(out.len() as u64 <= limit, "{compression}: {}", out.len());
    }
}

#[test]
fn a_bomb_stops_at_the_size_that_it_claims() {
    let bomb = {
        let mut plain = ELF_MAGIC.to_vec();
        plain.resize(64 << 20, 0);
        let mut compressed = gzip(&plain);
        let at = compressed.len() - 4;
        compressed[at..].copy_from_slice(&4096u32.to_le_bytes());
        compressed
    };
    let mut out = Vec::new();
    let result = unpack_into(&wrap(&bomb, "6.1.0"), &mut out, MAX_VMLINUX);
    assert!(
        matches!(result, Err(PayloadError::WrongSize { .. })),
        "{result:?}"
    );
    assert!(out.len() <= 4096, "{} bytes came out", out.len());
}

#[test]
fn a_payload_that_is_no_elf_file_is_refused() {
    let plain = b"#!/bin/sh\necho no kernel at all\n";
    let result = unpack(&wrap(&gzip(plain), "6.1.0"), MAX_VMLINUX);
    assert!(matches!(result, Err(PayloadError::NotElf)), "{result:?}");
}

#[test]
fn an_unknown_compression_is_named_by_its_first_bytes() {
    let error = unpack(&wrap(b"\x01\x02\x03\x04 what", "6.1.0"), MAX_VMLINUX).unwrap_err();
    assert!(error.to_string().contains("[01, 02, 03, 04]"), "{error}");
}

#[test]
fn flipped_bytes_never_panic() {
    // A cheap stand-in for the fuzzer: every decoder sees each of these damages.
    for (_, payload, plain) in payloads() {
        let step = (payload.len() / 50).max(1);
        for at in (0..payload.len()).step_by(step) {
            let mut damaged = payload.clone();
            damaged[at] ^= 0x55;
            let mut out = Vec::new();
            // Whether it is noticed depends on the format's checksums; that it ends does not.
            let _ = unpack_into(&wrap(&damaged, "6.1.0"), &mut out, plain.len() as u64);
            assert!(out.len() <= plain.len());
        }
    }
}
