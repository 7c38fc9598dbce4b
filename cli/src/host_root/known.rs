//! What is known of hosts: where systems keep programs, where toolchains live in homes, and where
//! credentials do. `docs/host-root.md` lists the same for people.

/// Directories of the system, of which everybody's files are shown.
pub const SYSTEM: &[&str] = &[
    "/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/etc", "/opt", "/nix", "/gnu",
];

/// What packages keep in /var and programs need to run.
pub const VAR: &[&str] = &[
    "/var/lib/alternatives",
    "/var/lib/apt",
    "/var/lib/aspell",
    "/var/lib/ca-certificates",
    "/var/lib/dictionaries-common",
    "/var/lib/dpkg",
    "/var/lib/gems",
    "/var/lib/ghc",
    "/var/lib/hunspell",
    "/var/lib/ispell",
    "/var/lib/pacman",
    "/var/lib/rpm",
    "/var/lib/sgml-base",
    "/var/lib/texmf",
    "/var/lib/xml-core",
];

/// Files of the system that are not shown even where everybody may read them, by some mistake or, as the
/// machine's id, on purpose.
pub const SYSTEM_SECRETS: &[&str] = &[
    "/etc/gshadow",
    "/etc/gshadow-",
    "/etc/krb5.keytab",
    "/etc/machine-id",
    "/etc/security/opasswd",
    "/etc/shadow",
    "/etc/shadow-",
    "/etc/ssl/private",
    "/etc/sudoers",
    "/etc/sudoers.d",
];

/// What the guest has of its own: nothing of the host's is shown there.
pub const GUESTS_OWN: &[&str] = &["/dev", "/proc", "/run", "/sys"];

/// Directories below which projects may be, but which are nobody's project.
pub const NO_PROJECTS: &[&str] = &[
    "/boot",
    "/lost+found",
    "/media",
    "/mnt",
    "/srv",
    "/tmp",
    "/var",
    "/var/lib",
    "/var/tmp",
];

/// Directories of the system below which there may be projects.
pub const PROJECTS: &[&str] = &["/opt", "/usr/src", "/usr/local/src", "/var/lib"];

/// A toolchain that lives in a home.
#[derive(Debug)]
pub struct Toolchain {
    /// What of it a name in PATH or another variable begins with, from the home on.
    pub at: &'static str,
    /// What belongs to it, from the home on.
    pub shown: &'static [&'static str],
}

const fn whole(at: &'static [&'static str; 1]) -> Toolchain {
    Toolchain {
        at: at[0],
        shown: at,
    }
}

/// The longest `at` that fits counts.
pub const TOOLCHAINS: &[Toolchain] = &[
    Toolchain {
        at: ".cargo",
        shown: &[".cargo", ".rustup"],
    },
    Toolchain {
        at: ".rustup",
        shown: &[".cargo", ".rustup"],
    },
    Toolchain {
        at: "go",
        shown: &["go/bin", "go/pkg"],
    },
    Toolchain {
        at: ".local",
        shown: LOCAL,
    },
    Toolchain {
        at: ".ghcup",
        shown: &[".ghcup", ".cabal/bin", ".cabal/packages", ".cabal/store"],
    },
    Toolchain {
        at: ".cabal",
        shown: &[".cabal/bin", ".cabal/packages", ".cabal/store"],
    },
    Toolchain {
        at: ".juliaup",
        shown: &[".juliaup", ".julia"],
    },
    Toolchain {
        at: ".config/composer/vendor",
        shown: &[".config/composer/vendor"],
    },
    whole(&[".asdf"]),
    whole(&[".bun"]),
    whole(&[".composer/vendor"]),
    whole(&[".config/yarn/global"]),
    whole(&[".deno"]),
    whole(&[".dotnet"]),
    whole(&[".elan"]),
    whole(&[".fnm"]),
    whole(&[".foundry"]),
    whole(&[".gem"]),
    whole(&[".goenv"]),
    whole(&[".jenv"]),
    whole(&[".julia"]),
    whole(&[".linuxbrew"]),
    whole(&[".local/share/fnm"]),
    whole(&[".local/share/mise"]),
    whole(&[".local/share/nvm"]),
    whole(&[".local/share/pnpm"]),
    whole(&[".local/share/uv"]),
    whole(&[".luarocks"]),
    whole(&[".nimble"]),
    whole(&[".nodenv"]),
    whole(&[".npm-global"]),
    whole(&[".nvm"]),
    whole(&[".opam"]),
    whole(&[".pixi"]),
    whole(&[".poetry"]),
    whole(&[".proto"]),
    whole(&[".pyenv"]),
    whole(&[".rbenv"]),
    whole(&[".rvm"]),
    whole(&[".rye"]),
    whole(&[".sdkman"]),
    whole(&[".stack"]),
    whole(&[".swiftly"]),
    whole(&[".volta"]),
    whole(&["anaconda3"]),
    whole(&["mambaforge"]),
    whole(&["micromamba"]),
    whole(&["miniconda3"]),
    whole(&["miniforge3"]),
    whole(&["sdk"]),
];

/// Where programs are installed for one user. Of .local/share, where all kinds of programs keep what is
/// private, only what holds programs.
const LOCAL: &[&str] = &[
    ".local/bin",
    ".local/include",
    ".local/lib",
    ".local/libexec",
    ".local/pipx",
    ".local/share/pipx",
    ".local/share/pnpm",
    ".local/share/uv",
];

/// What comes with a program that is found in PATH, from the home on.
pub const COMPANIONS: &[(&str, &[&str])] =
    &[("go", &["go/bin", "go/pkg"]), ("python3", &[".local/lib"])];

/// Beside a `bin` of which nothing is known.
pub const BESIDE_BIN: &[&str] = &["include", "lib", "lib64", "libexec"];

/// Variables whose value is a toolchain's directory; passed on to the command.
pub const DIRECTORY_VARIABLES: &[&str] = &[
    "ASDF_DATA_DIR",
    "ASDF_DIR",
    "BUN_INSTALL",
    "CARGO_HOME",
    "CONDA_PREFIX",
    "DENO_INSTALL",
    "DOTNET_ROOT",
    "GEM_HOME",
    "GOROOT",
    "JAVA_HOME",
    "NVM_DIR",
    "OPAMROOT",
    "PNPM_HOME",
    "PYENV_ROOT",
    "RBENV_ROOT",
    "RUSTUP_HOME",
    "SDKMAN_DIR",
    "VIRTUAL_ENV",
    "VOLTA_HOME",
];

/// Other variables that are passed on to the command.
pub const VARIABLES: &[&str] = &[
    "GOPATH",
    "GOTOOLCHAIN",
    "LANG",
    "LANGUAGE",
    "LC_ALL",
    "LC_COLLATE",
    "LC_CTYPE",
    "LC_MESSAGES",
    "LC_NUMERIC",
    "LC_TIME",
    "NODE_PATH",
    "PERL5LIB",
    "PYENV_VERSION",
    "PYTHONPATH",
    "RUBYLIB",
    "RUSTUP_TOOLCHAIN",
    "TZ",
];

/// Where programs keep credentials, from the home on: hidden unless they are asked for by name.
pub const CREDENTIALS: &[&str] = &[
    ".aws",
    ".azure",
    ".bundle/config",
    ".cargo/credentials",
    ".cargo/credentials.toml",
    ".composer/auth.json",
    ".config/composer/auth.json",
    ".config/containers/auth.json",
    ".config/gcloud",
    ".config/gh",
    ".config/git/credentials",
    ".config/glab-cli",
    ".config/hub",
    ".config/op",
    ".config/pip",
    ".config/pypoetry",
    ".config/rclone",
    ".config/sops",
    ".databrickscfg",
    ".docker",
    ".gem/credentials",
    ".git-credentials",
    ".gnupg",
    ".gradle/gradle.properties",
    ".kube",
    ".local/share/gem/credentials",
    ".local/share/keyrings",
    ".local/share/uv/credentials",
    ".m2/settings-security.xml",
    ".m2/settings.xml",
    ".my.cnf",
    ".netrc",
    ".npmrc",
    ".nuget/NuGet",
    ".password-store",
    ".pgpass",
    ".pip",
    ".pki",
    ".pypirc",
    ".ssh",
    ".terraform.d",
    ".terraformrc",
    ".vault-token",
    ".yarnrc.yml",
];

/// Names of files with credentials, and of directories with such, wherever they are in a toolchain.
pub const CREDENTIAL_NAMES: &[&str] = &[
    ".aws",
    ".azure",
    ".docker",
    ".git-credentials",
    ".gnupg",
    ".kube",
    ".my.cnf",
    ".netrc",
    ".npmrc",
    ".pgpass",
    ".pypirc",
    ".ssh",
    ".vault-token",
    "_netrc",
    "id_dsa",
    "id_ecdsa",
    "id_ecdsa_sk",
    "id_ed25519",
    "id_ed25519_sk",
    "id_rsa",
];
