//! Who can read: `add`, `add-recipient`, `remove-recipient`, `rotate`.

use std::path::Path;

use secrecy::ExposeSecret;
use serde::Serialize;

use super::super::init::write_new;
use super::super::output::count;
use super::super::several::Away;
use super::{
    AddArgs, AddRecipientArgs, CliError, Context, Exit, RemoveRecipientArgs, key_at, note, open, opened, the_key,
};
use crate::catalog::Repository;
use crate::catalog::events::Happened;
use crate::catalog::keys::{Envelopes, RecipientChange, RecipientList};
use crate::config::read_passphrase;
use crate::seal::{KeyFile, Recipient};

#[derive(Debug, Serialize)]
struct Document {
    repositories: Vec<Line>,
    /// Repositories that do not answer.
    away: Vec<Away>,
}

#[derive(Debug, Serialize)]
struct Line {
    repository: String,
    /// The list is another one now.
    changed: bool,
    /// The list in force; 0: there is none, the key file says it.
    list: u32,
    recipients: Vec<String>,
    /// What was made for a new recipient.
    #[serde(skip_serializing_if = "Option::is_none")]
    envelopes: Option<Envelopes>,
}

impl Line {
    fn new(repository: &Repository, list: &RecipientList, changed: bool) -> Line {
        Line {
            repository: repository.name().to_owned(),
            changed,
            list: list.number,
            recipients: list.recipients.iter().map(|known| known.recipient.to_string()).collect(),
            envelopes: None,
        }
    }
}

/// A key that opens nothing can make no envelopes, and is not to decide who reads.
fn refuse_write_only<'a>(repositories: impl IntoIterator<Item = &'a Repository>) -> Result<(), CliError> {
    match repositories.into_iter().find(|repository| !repository.can_read()) {
        None => Ok(()),
        Some(repository) => {
            let error =
                anyhow::anyhow!("the key of repository {} can only write; nothing was changed", repository.name());
            Err(CliError::refused(error).hint("run this where the key file with the identity is"))
        }
    }
}

pub(super) async fn add(context: &Context, args: AddArgs) -> Result<Exit, CliError> {
    let ours = the_key(context).await?;
    let path = std::path::absolute(&args.key_file)
        .map_err(|error| CliError::usage(error).context(format!("find {}", args.key_file.display())))?;
    let there = path.try_exists();
    let there = there.map_err(|error| CliError::usage(error).context(format!("look at {}", path.display())))?;
    if !ours.can_read() {
        let error = anyhow::anyhow!("the key in use can only write; nothing was changed");
        return Err(CliError::refused(error).hint("run this where the key file with the identity is"));
    }
    let key = match there {
        true => {
            let key = key_at(&path, args.passphrase_file.clone()).await?;
            if key.meta_key().id() != ours.meta_key().id() {
                let error = anyhow::anyhow!("{} is there and belongs to another realm", path.display());
                return Err(CliError::refused(error).hint("nothing was changed; name another file"));
            }
            key
        }
        false => {
            let key = ours.with_new_identity();
            write(&key, &path, args.passphrase_file.as_deref()).await?;
            key
        }
    };
    let Some(recipient) = key.own_recipient() else {
        let error = anyhow::anyhow!("{} can only write: there is nobody to add", path.display());
        return Err(CliError::refused(error).hint("nothing was changed; name another file"));
    };
    let word = if there { "kept" } else { "made" };
    context.output.line(format!("{word}  key  {}  {recipient}", path.display()));
    let exit = let_read(context, recipient, args.name).await?;
    if !there {
        context.output.line(format!("Keep {} apart from the one that is used now.", path.display()));
    }
    Ok(exit)
}

/// Durable before anything is sealed for it.
async fn write(key: &KeyFile, path: &Path, passphrase_file: Option<&Path>) -> Result<(), CliError> {
    let Some(passphrase_file) = passphrase_file else {
        return write_new(path, key.render().expose_secret().as_bytes(), 0o600);
    };
    let passphrase = read_passphrase(passphrase_file).map_err(|error| CliError::usage(anyhow::Error::msg(error)))?;
    let key = key.clone();
    // scrypt takes a second, by intent.
    let sealed = tokio::task::spawn_blocking(move || key.encrypt_with_passphrase(&passphrase)).await;
    let sealed = sealed.map_err(CliError::failed)?.map_err(CliError::failed)?;
    write_new(path, &sealed, 0o600)
}

pub(super) async fn add_recipient(context: &Context, args: AddRecipientArgs) -> Result<Exit, CliError> {
    let_read(context, args.recipient, args.name).await
}

async fn let_read(context: &Context, recipient: Recipient, name: Option<String>) -> Result<Exit, CliError> {
    let several = opened(context).await?;
    refuse_write_only(several.open.iter().map(|(repository, _)| repository))?;
    let mut document = Document { repositories: Vec::new(), away: several.away };
    let mut exit = Exit::Done;
    for (repository, _) in &several.open {
        let change = RecipientChange::Add(recipient.clone(), name.clone());
        // The list first: whoever makes a key from now on makes it for the new one, too.
        let (list, changed) = repository.change_recipients(&change).await.map_err(open::repository_error)?;
        if changed {
            note(repository, Happened::RecipientAdded { recipient: recipient.clone(), list: list.number }).await;
        }
        let envelopes = repository.open_to(&recipient).await.map_err(open::repository_error)?;
        let (output, name) = (&context.output, repository.name());
        let word = if changed { "is" } else { "was already" };
        output.line(format!("Repository {name}: content {word} sealed for {recipient} (list {})", list.number));
        let (made, keys) = (envelopes.made, count(envelopes.keys, "key"));
        output.line(format!("  {keys} there: {made} opened to it now, {} before", envelopes.there));
        if envelopes.closed > 0 {
            exit = Exit::No;
            output.line(format!("  {} STAY CLOSED to it, because this key file does not open them:", envelopes.closed));
            envelopes.which.iter().for_each(|which| output.line(format!("    {which}")));
        }
        document.repositories.push(Line { envelopes: Some(envelopes), ..Line::new(repository, &list, changed) });
    }
    Ok(tell(context, document, exit))
}

pub(super) async fn remove_recipient(context: &Context, args: RemoveRecipientArgs) -> Result<Exit, CliError> {
    let (recipient, several) = (args.recipient, opened(context).await?);
    refuse_write_only(several.open.iter().map(|(repository, _)| repository))?;
    if the_key_of_any(context, &recipient).await? {
        let error = anyhow::anyhow!("{recipient} is the recipient of a key file that this configuration uses");
        return Err(CliError::refused(error).hint(
            "nothing was changed; make another one (`pgkeep key add`), name it as key_file on every host, and then remove this one",
        ));
    }
    let mut document = Document { repositories: Vec::new(), away: several.away };
    let mut removed = false;
    for (repository, _) in &several.open {
        let change = RecipientChange::Remove(recipient.clone());
        let (list, changed) = repository.change_recipients(&change).await.map_err(open::repository_error)?;
        let name = repository.name();
        if changed {
            removed = true;
            note(repository, Happened::RecipientRemoved { recipient: recipient.clone(), list: list.number }).await;
            let left = count(list.recipients.len() as u64, "recipient");
            context.output.line(format!("Repository {name}: no content is sealed for it from now on; {left} left"));
        } else {
            context.output.line(format!("Repository {name}: {recipient} is no recipient"));
        }
        document.repositories.push(Line::new(repository, &list, changed));
    }
    if removed {
        context.output.line(
            "\nWhat this does not undo:\n\
             - everything that was sealed up to now stays open to whoever has that identity and the objects;\n\
             - a run of pgkeep that is under way uses its content key for ten minutes more;\n\
             - who has a key file has the meta key: names, sizes, file lists and records stay open to him, and he can\n  \
               write. To end that make a new repository with a new key: pgkeep key rotate --help",
        );
    }
    let exit = if removed { Exit::Done } else { Exit::No };
    Ok(tell(context, document, exit))
}

/// Whether it belongs to a key file of the configuration.
async fn the_key_of_any(context: &Context, recipient: &Recipient) -> Result<bool, CliError> {
    let config = context.config()?;
    for place in super::wanted(context, &config)? {
        if open::key(&place.key, &place.name).await?.own_recipient().as_ref() == Some(recipient) {
            return Ok(true);
        }
    }
    Ok(false)
}

pub(super) async fn rotate(context: &Context) -> Result<Exit, CliError> {
    let several = opened(context).await?;
    let mut document = Document { repositories: Vec::new(), away: several.away };
    for (repository, _) in &several.open {
        let (list, changed) =
            repository.change_recipients(&RecipientChange::Rotate).await.map_err(open::repository_error)?;
        note(repository, Happened::KeysRotated { list: list.number }).await;
        let retired = count(list.retired.len() as u64, "content key");
        let name = repository.name();
        context.output.line(format!("Repository {name}: {retired} of today not used any more (list {})", list.number));
        document.repositories.push(Line::new(repository, &list, changed));
    }
    context.output.line("A run of pgkeep that is under way takes a new one within ten minutes. The meta key stays.");
    Ok(tell(context, document, Exit::Done))
}

fn tell(context: &Context, document: Document, exit: Exit) -> Exit {
    context.output.document(&document);
    for away in &document.away {
        context.output.line(format!("Repository {} is left out: {}", away.repository, away.why));
    }
    // A change that is not everywhere is less than was asked for.
    if document.away.is_empty() { exit } else { Exit::Failed }
}
