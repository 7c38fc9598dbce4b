//! Kernel releases (`uname -r`): which strings are one, and which of two is newer.

use std::cmp::Ordering;
use std::iter::Peekable;
use std::str::Chars;

/// `__NEW_UTS_LEN` of the kernel: the longest release there is.
const MAX_LEN: usize = 64;

/// `bytes` as a kernel release, or None where they cannot be one.
///
/// A release that is returned is a safe file name: letters, digits and `.+~_-`, beginning with a
/// digit.
pub fn release(bytes: &[u8]) -> Option<String> {
    let text = std::str::from_utf8(bytes).ok()?;
    let fits = |c: char| c.is_ascii_alphanumeric() || ".+~_-".contains(c);
    (text.len() <= MAX_LEN
        && text.starts_with(|c: char| c.is_ascii_digit())
        && text.chars().all(fits))
    .then(|| text.to_owned())
}

/// Orders releases and package versions: runs of digits by their value, the rest by character.
pub fn compare(a: &str, b: &str) -> Ordering {
    let (mut a, mut b) = (a.chars().peekable(), b.chars().peekable());
    loop {
        let (Some(&x), Some(&y)) = (a.peek(), b.peek()) else {
            return a.peek().is_some().cmp(&b.peek().is_some());
        };
        let order = if x.is_ascii_digit() && y.is_ascii_digit() {
            let (x, y) = (digits(&mut a), digits(&mut b));
            x.len().cmp(&y.len()).then_with(|| x.cmp(&y))
        } else {
            a.next();
            b.next();
            x.cmp(&y)
        };
        if order != Ordering::Equal {
            return order;
        }
    }
}

/// Takes a run of digits without its leading zeros, so that longer means larger.
fn digits(chars: &mut Peekable<Chars<'_>>) -> String {
    let mut run = String::new();
    while let Some(digit) = chars.next_if(char::is_ascii_digit) {
        if !(run.is_empty() && digit == '0') {
            run.push(digit);
        }
    }
    run
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_compared_by_value() {
        for (older, newer) in [
            ("6.1.0", "6.12.0"),
            ("6.1.0-9-cloud-amd64", "6.1.0-56-cloud-amd64"),
            ("6.1", "6.1.1"),
            ("6.1.0-56-amd64", "6.1.0-56-cloud-amd64"),
            ("99", "18446744073709551617000"),
        ] {
            assert_eq!(compare(older, newer), Ordering::Less, "{older} {newer}");
            assert_eq!(compare(newer, older), Ordering::Greater, "{newer} {older}");
        }
        assert_eq!(compare("6.01", "6.1"), Ordering::Equal);
    }

    #[test]
    fn a_release_is_a_safe_file_name() {
        assert_eq!(release(b"6.12.117+deb12-cloud-amd64").unwrap().len(), 26);
        for bad in ["", "..", "6/1", "six", "6.1 x", "6\0", &"6".repeat(65)] {
            assert_eq!(release(bad.as_bytes()), None, "{bad:?}");
        }
        assert_eq!(release(b"6.\xff"), None);
    }
}
