//! The key on paper: `export` and `import`.

use std::io::Read;

use jiff::Timestamp;
use secrecy::{ExposeSecret, SecretString};
use serde::Serialize;
use zeroize::Zeroizing;

use super::super::init::write_new;
use super::{CliError, Context, Exit, ExportArgs, ImportArgs, the_key, wanted};
use crate::seal::KeyFile;

/// What was typed is a page.
const MAX_LEN: u64 = 64 << 10;

#[derive(Debug, Serialize)]
struct Written {
    output: std::path::PathBuf,
}

pub(super) async fn export(context: &Context, args: ExportArgs) -> Result<Exit, CliError> {
    if context.output.is_json() && args.output.is_none() {
        let error = anyhow::anyhow!("a recovery sheet is for paper, and --json is not");
        return Err(CliError::usage(error).hint("write it into a file with --output"));
    }
    let key = the_key(context).await?;
    let Some(lines) = key.to_sheet() else {
        let error = anyhow::anyhow!("the key in use can only write: a sheet of it would restore nothing");
        return Err(CliError::refused(error).hint("run this where the key file with the identity is"));
    };
    let sheet = page(context, &key, &lines)?;
    match args.output {
        Some(path) => {
            write_new(&path, sheet.expose_secret().as_bytes(), 0o600)?;
            let text = format!("{} holds the secret: print it, put it away, and remove the file.", path.display());
            context.output.result(&Written { output: path }, text);
        }
        None => context.output.line(sheet.expose_secret().trim_end()),
    }
    Ok(Exit::Done)
}

/// All that somebody needs who finds nothing but this page and the repository.
fn page(context: &Context, key: &KeyFile, lines: &SecretString) -> Result<SecretString, CliError> {
    let config = context.config()?;
    let of_realm: Vec<String> =
        wanted(context, &config)?.into_iter().map(|place| format!("  {:<12} {}", place.name, place.place)).collect();
    let clusters: Vec<&str> = config.clusters.iter().map(|cluster| cluster.name_in_repository.as_str()).collect();
    let mut page = Zeroizing::new(String::with_capacity(16 << 10)); // enough: growing would leave a copy behind
    page.push_str(&format!(
        "RECOVERY SHEET FOR BACKUPS MADE BY PGKEEP\n\
         \n\
         Whoever has this page and a repository can read every database in it. Without a key like this one nobody can.\n\
         Keep it where a fire, a thief or a mistake that takes the database host or the repository does not take it, too.\n\
         \n\
         Written       {} by pgkeep {}\n\
         Meta key      {}\n\
         Recipient     {}\n\
         Clusters      {}\n\
         Repositories  (name, place)\n{}\n\
         \n\
         The key. Letters may be typed small, and all spaces but the first one of a line left out; the last four characters of\n\
         each line are check digits. Behind the first column there is no letter O and no letter I: they are 0 and 1.\n\
         \n",
        Timestamp::now().strftime("%Y-%m-%d %H:%M UTC"),
        env!("CARGO_PKG_VERSION"),
        key.meta_key().id(),
        key.recipients().join(", "),
        if clusters.is_empty() { "-".to_owned() } else { clusters.join(", ") },
        of_realm.join("\n"),
    ));
    for line in lines.expose_secret().lines() {
        page.push_str("    ");
        page.push_str(line);
        page.push('\n');
    }
    page.push_str(
        "\n\
         To restore, on a host with PostgreSQL of the cluster's major version and pgkeep:\n\
         \n\
         1. Type the lines above into a file, sheet.txt, and make the key file of it:\n\
            pgkeep key import sheet.txt --key-file main.key\n\
         2. Write pgkeep.toml (for a bucket url = \"s3://...\" instead of path, and its credentials):\n\
            [repository.main]\n\
            path = \"/where/the/repository/is\"\n\
            key_file = \"main.key\"\n\
         3. Look what is there, and restore:\n\
            pgkeep --config pgkeep.toml list\n\
            pgkeep --config pgkeep.toml restore --to latest --pgdata /empty/directory\n\
            pg_ctl -D /empty/directory start\n\
         \n\
         The bytes of a repository are described in docs/format.md of pgkeep, well enough to read them without it.\n",
    );
    Ok(SecretString::from(page.as_str()))
}

pub(super) fn import(context: &Context, args: ImportArgs) -> Result<Exit, CliError> {
    let shown = args.sheet.display().to_string();
    let failed = |error: std::io::Error| CliError::usage(error).context(format!("read {shown}"));
    let mut text = Zeroizing::new(String::with_capacity(16 << 10));
    match shown.as_str() {
        "-" => std::io::stdin().lock().take(MAX_LEN).read_to_string(&mut text).map_err(failed)?,
        _ => {
            let file = std::fs::File::open(&args.sheet).map_err(failed)?;
            file.take(MAX_LEN).read_to_string(&mut text).map_err(failed)?
        }
    };
    let key = KeyFile::from_sheet(&text)
        .map_err(|error| CliError::usage(error).context(format!("read the recovery sheet {shown}")))?;
    write_new(&args.key_file, key.render().expose_secret().as_bytes(), 0o600)?;
    let text = format!("made  key  {} (meta key {})", args.key_file.display(), key.meta_key().id());
    context.output.result(&Written { output: args.key_file }, text);
    Ok(Exit::Done)
}
