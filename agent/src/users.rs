//! Users and groups from a tree's /etc/passwd and /etc/group (passwd(5), group(5)).
//!
//! The agent is static and has no name service, so it reads the two files itself.

use std::str;

/// Who a command runs as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// The login name; None for a number that /etc/passwd does not have.
    pub name: Option<Vec<u8>>,
    /// User id.
    pub uid: u32,
    /// Primary group id.
    pub gid: u32,
    /// Supplementary group ids, the primary one not among them.
    pub groups: Vec<u32>,
    /// Home directory.
    pub home: Vec<u8>,
    /// Login shell.
    pub shell: Vec<u8>,
}

/// Why there is no such user in a machine.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum UserError {
    /// Neither a name of /etc/passwd nor a number.
    #[error(
        "there is no user {0:?} in the machine: it is neither a name in its /etc/passwd nor a number"
    )]
    NoUser(String),
    /// Neither a name of /etc/group nor a number.
    #[error(
        "there is no group {0:?} in the machine: it is neither a name in its /etc/group nor a number"
    )]
    NoGroup(String),
}

/// The linux kernel's limit is 65,536 groups; a process with more than these few is an attack.
const MAX_GROUPS: usize = 1024;

/// Resolves `NAME`, `UID`, `NAME:GROUP` or `UID:GID`; None is uid 0.
///
/// A name wins over a number of the same spelling. An explicit group replaces the primary group
/// and all supplementary ones.
pub fn resolve(spec: Option<&str>, passwd: &[u8], group: &[u8]) -> Result<User, UserError> {
    let (user_spec, group_spec) = match spec {
        None => ("0", None),
        Some(spec) => match spec.split_once(':') {
            Some((user, group)) => (user, Some(group)),
            None => (spec, None),
        },
    };
    let mut user = find_user(user_spec, passwd)?;
    match group_spec {
        Some(spec) => user.gid = find_group(spec, group)?,
        None => user.groups = supplementary_groups(&user, group),
    }
    Ok(user)
}

fn find_user(spec: &str, passwd: &[u8]) -> Result<User, UserError> {
    let by_name = || users(passwd).find(|user| user.name.as_deref() == Some(spec.as_bytes()));
    let by_uid = |uid| users(passwd).find(|user| user.uid == uid);
    if let Some(user) = by_name() {
        return Ok(user);
    }
    let uid = id(spec.as_bytes()).ok_or_else(|| UserError::NoUser(spec.to_owned()))?;
    Ok(by_uid(uid).unwrap_or_else(|| User {
        name: (uid == 0).then(|| b"root".to_vec()),
        uid,
        gid: if uid == 0 { 0 } else { uid },
        groups: Vec::new(),
        home: if uid == 0 {
            b"/root".to_vec()
        } else {
            b"/".to_vec()
        },
        shell: b"/bin/sh".to_vec(),
    }))
}

fn find_group(spec: &str, group: &[u8]) -> Result<u32, UserError> {
    let named = groups(group).find(|entry| entry.name == spec.as_bytes());
    named
        .map(|entry| entry.gid)
        .or_else(|| id(spec.as_bytes()))
        .ok_or_else(|| UserError::NoGroup(spec.to_owned()))
}

fn supplementary_groups(user: &User, group: &[u8]) -> Vec<u32> {
    let Some(name) = &user.name else {
        return Vec::new();
    };
    let mut found = Vec::new();
    for entry in groups(group) {
        let is_member = entry
            .members
            .split(|&b| b == b',')
            .any(|member| member == name);
        if is_member && entry.gid != user.gid && !found.contains(&entry.gid) {
            found.push(entry.gid);
        }
        if found.len() == MAX_GROUPS {
            break;
        }
    }
    found
}

/// The well-formed entries of a passwd file; others are passed over, as every reader of it does.
fn users(passwd: &[u8]) -> impl Iterator<Item = User> {
    lines(passwd).filter_map(|line| {
        let mut fields = line.split(|&b| b == b':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        let _password = fields.next()?;
        let uid = id(fields.next()?)?;
        let gid = id(fields.next()?)?;
        let _full_name = fields.next()?;
        let home = fields.next()?;
        let shell = fields.next().unwrap_or_default();
        Some(User {
            name: Some(name.to_vec()),
            uid,
            gid,
            groups: Vec::new(),
            home: if home.is_empty() {
                b"/".to_vec()
            } else {
                home.to_vec()
            },
            shell: if shell.is_empty() {
                b"/bin/sh".to_vec()
            } else {
                shell.to_vec()
            },
        })
    })
}

struct Group<'a> {
    name: &'a [u8],
    gid: u32,
    members: &'a [u8],
}

fn groups(group: &[u8]) -> impl Iterator<Item = Group<'_>> {
    lines(group).filter_map(|line| {
        let mut fields = line.split(|&b| b == b':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        let _password = fields.next()?;
        let gid = id(fields.next()?)?;
        let members = fields.next().unwrap_or_default();
        Some(Group { name, gid, members })
    })
}

fn lines(file: &[u8]) -> impl Iterator<Item = &[u8]> {
    file.split(|&b| b == b'\n')
        .map(|line| line.strip_suffix(b"\r").unwrap_or(line))
}

/// A user or group id: digits only; the highest number means "no change" to the kernel.
fn id(text: &[u8]) -> Option<u32> {
    if text.is_empty() || !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let id: u32 = str::from_utf8(text).ok()?.parse().ok()?;
    (id != u32::MAX).then_some(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &[u8] = b"root:x:0:0:root:/root:/bin/bash\n\
        # a comment\n\
        broken:x:many:1:::\n\
        alice:x:1000:1000:Alice,,,:/home/alice:/bin/zsh\n\
        1000:x:7:7::/home/seven:/bin/sh\n\
        bare:x:8:8:::\n";
    const GROUP: &[u8] =
        b"root:x:0:\nwheel:x:10:alice,root\naudio:x:29:bob,alice\nalice:x:1000:alice\nshort:x:5\n";

    #[test]
    fn a_name_brings_its_home_shell_and_groups() {
        let user = resolve(Some("alice"), PASSWD, GROUP).unwrap();
        assert_eq!(
            (user.uid, user.gid, user.groups),
            (1000, 1000, vec![10, 29])
        );
        assert_eq!(
            (user.home.as_slice(), user.shell.as_slice()),
            (&b"/home/alice"[..], &b"/bin/zsh"[..])
        );
    }

    #[test]
    fn no_user_is_root_even_without_a_passwd_file() {
        assert_eq!(resolve(None, PASSWD, GROUP).unwrap().shell, b"/bin/bash");
        let user = resolve(None, b"", b"").unwrap();
        assert_eq!(
            (user.uid, user.gid, user.home.as_slice()),
            (0, 0, &b"/root"[..])
        );
    }

    #[test]
    fn a_number_need_not_be_in_the_passwd_file() {
        let user = resolve(Some("4242"), PASSWD, GROUP).unwrap();
        assert_eq!((user.name, user.uid, user.gid), (None, 4242, 4242));
        assert_eq!(resolve(Some("8"), PASSWD, GROUP).unwrap().shell, b"/bin/sh");
    }

    #[test]
    fn a_name_wins_over_a_number_of_the_same_spelling() {
        assert_eq!(resolve(Some("1000"), PASSWD, GROUP).unwrap().uid, 7);
    }

    #[test]
    fn an_explicit_group_is_the_only_group() {
        let user = resolve(Some("alice:audio"), PASSWD, GROUP).unwrap();
        assert_eq!((user.gid, user.groups), (29, vec![]));
        assert_eq!(resolve(Some("alice:77"), PASSWD, GROUP).unwrap().gid, 77);
    }

    #[test]
    fn what_is_neither_name_nor_number_is_named_in_the_error() {
        for spec in ["nobody-here", "", "-1", "+5", "4294967295", "99999999999"] {
            let error = resolve(Some(spec), PASSWD, GROUP).unwrap_err();
            assert_eq!(error, UserError::NoUser(spec.to_owned()));
        }
        let error = resolve(Some("alice:"), PASSWD, GROUP).unwrap_err();
        assert_eq!(error, UserError::NoGroup(String::new()));
    }
}
