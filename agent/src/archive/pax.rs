//! Records of pax extended headers: `LENGTH KEYWORD=VALUE\n`, the value being any bytes.

use super::ArchiveError;
use super::member::Time;

/// Appends one record.
pub fn push(records: &mut Vec<u8>, keyword: &[u8], value: &[u8]) {
    // A space, an equals sign, a newline.
    let rest = keyword.len() + value.len() + 3;
    let mut len = rest;
    // The length counts its own digits.
    while len != rest + digits(len) {
        len = rest + digits(len);
    }
    records.extend_from_slice(len.to_string().as_bytes());
    records.push(b' ');
    records.extend_from_slice(keyword);
    records.push(b'=');
    records.extend_from_slice(value);
    records.push(b'\n');
}

fn digits(number: usize) -> usize {
    number.checked_ilog10().map_or(1, |log| log as usize + 1)
}

/// The records of an extended header, in their order.
#[derive(Debug)]
pub struct Records<'a>(pub &'a [u8]);

impl<'a> Iterator for Records<'a> {
    type Item = Result<(&'a [u8], &'a [u8]), ArchiveError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let split = split_first(self.0);
        self.0 = split.map_or(&[], |(_, rest)| rest);
        let record = split.map(|(record, _)| record);
        Some(record.ok_or(ArchiveError::Damaged(
            "an extended header is no list of records",
        )))
    }
}

type Record<'a> = (&'a [u8], &'a [u8]);

fn split_first(records: &[u8]) -> Option<(Record<'_>, &[u8])> {
    let space = records.iter().position(|&byte| byte == b' ')?;
    let len = usize::try_from(number(records.get(..space)?)?).ok()?;
    let record = records.get(space + 1..len)?.strip_suffix(b"\n")?;
    let equals = record.iter().position(|&byte| byte == b'=')?;
    let (keyword, value) = (record.get(..equals)?, record.get(equals + 1..)?);
    Some(((keyword, value), records.get(len..)?))
}

/// A decimal number, digits only.
pub fn number(text: &[u8]) -> Option<u64> {
    if text.is_empty() || !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// A time as seconds with a fraction, such as `-1.5`; what is finer than nanoseconds is cut off.
pub fn time(text: &[u8]) -> Option<Time> {
    let (negative, text) = match text.strip_prefix(b"-") {
        Some(text) => (true, text),
        None => (false, text),
    };
    let mut parts = text.splitn(2, |&byte| byte == b'.');
    let whole = i64::try_from(number(parts.next()?)?).ok()?;
    let mut nanoseconds = 0;
    if let Some(fraction) = parts.next() {
        if !fraction.iter().all(u8::is_ascii_digit) {
            return None;
        }
        for place in 0..9 {
            let digit = fraction.get(place).map_or(0, |digit| digit - b'0');
            nanoseconds = nanoseconds * 10 + u32::from(digit);
        }
    }
    Some(match (negative, nanoseconds) {
        (false, _) => Time {
            seconds: whole,
            nanoseconds,
        },
        (true, 0) => Time {
            seconds: -whole,
            nanoseconds,
        },
        (true, _) => Time {
            seconds: -whole - 1,
            nanoseconds: 1_000_000_000 - nanoseconds,
        },
    })
}

/// The text of a time.
pub fn time_text(time: Time) -> String {
    let Time {
        seconds,
        nanoseconds,
    } = time;
    match (seconds, nanoseconds) {
        (_, 0) => seconds.to_string(),
        (0.., _) => format!("{seconds}.{nanoseconds:09}"),
        // -2 s and 0.5 s is -1.5 s.
        (..0, _) => format!("-{}.{:09}", -(seconds + 1), 1_000_000_000 - nanoseconds),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_come_back_whatever_their_lengths_and_bytes() {
        for len in (0..1100).chain([9_980, 9_990, 99_985, 99_990]) {
            let value: Vec<u8> = (0..len).map(|i| b"\n=\xff 7"[i % 5]).collect();
            let mut records = Vec::new();
            push(&mut records, b"path", &value);
            push(&mut records, b"k", b"v");
            let read: Result<Vec<_>, _> = Records(&records).collect();
            assert_eq!(
                read.unwrap(),
                [(&b"path"[..], &value[..]), (b"k", b"v")],
                "{len} bytes"
            );
        }
    }

    #[test]
    fn what_is_no_record_is_an_error_and_the_end() {
        for bad in [
            &b"x"[..],
            b"5 a=b",
            b"4 a=b\n",
            b"99999999999999999999 a=b\n",
            b"0 a=b\n",
            b"-6 a=b\n",
            b"6 a b\n",
            b" a=b\n",
            b"100 a=b\n",
        ] {
            let read: Vec<_> = Records(bad).collect();
            assert!(matches!(read.as_slice(), [Err(_)]), "{bad:?}: {read:?}");
        }
    }

    #[test]
    fn times_come_back_to_the_nanosecond() {
        for (seconds, nanoseconds) in [
            (0, 0),
            (0, 1),
            (1_700_000_000, 123_456_789),
            (-1, 0),
            (-1, 999_999_999),
            (-2, 500_000_000),
            (i64::MAX, 7),
            (i64::MIN + 1, 7),
        ] {
            let sent = Time {
                seconds,
                nanoseconds,
            };
            assert_eq!(
                time(time_text(sent).as_bytes()),
                Some(sent),
                "{}",
                time_text(sent)
            );
        }
        let half = Time {
            seconds: -2,
            nanoseconds: 500_000_000,
        };
        assert_eq!(time(b"-1.5"), Some(half));
        assert_eq!(time(b"3.1234567899999").unwrap().nanoseconds, 123_456_789);
        for bad in [
            &b""[..],
            b".5",
            b"1.x",
            b"+1",
            b"1e9",
            b"9223372036854775808",
            b"--1",
        ] {
            assert_eq!(time(bad), None, "{bad:?}");
        }
    }
}
