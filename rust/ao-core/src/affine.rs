//! Which contents a chat template cannot tell apart.
//!
//! A template is affine for a content if it does nothing with it but show it, its white space cut: then the rendering is
//! the pieces around the contents, which depend on the roles alone. Templates look into contents, though (`'</think>' in
//! content`), so this module reads the template's syntax tree and follows where contents go. Every operation that a
//! content can reach must be one whose result is known for an *inert* content: not blank, holding none of the strings
//! that are looked for, and equal to none of those that it is compared with. All inert contents then take the same way
//! through the template, so one rendering with marks stands for all. An operation that is not known here makes the
//! template opaque, and it is rendered every time.

use std::collections::HashMap;

use memchr::memmem::Finder;
use minijinja::Value;
use minijinja::machinery::ast::{self, BinOpKind, CallArg, CompareOpKind, Expr, Stmt, UnaryOpKind};
use minijinja::machinery::parse;
use minijinja::syntax::SyntaxConfig;

use crate::template::is_python_space;

/// What `tojson` puts in front of what it writes of a mark, so that a probe shows it.
pub(crate) const QUOTED_MARK: char = '\u{ff6fd}';

/// What tells contents apart in one template.
#[derive(Debug, Default)]
pub(crate) struct Inspections {
    sought: Vec<Finder<'static>>,
    compared: Vec<String>,
}

impl Inspections {
    /// Read a template; `None` if it may do more with a content than is known here.
    pub(crate) fn of(source: &str, syntax: SyntaxConfig) -> Option<Self> {
        let tree = parse(source, "chat_template", syntax).ok()?;
        let mut flow = Flow::default();
        // Names hold what any assignment may have put there, so the walk goes on until none holds more.
        for _ in 0..MOST_WALKS {
            flow.changed = false;
            flow.statement(&tree).ok()?;
            if !flow.changed {
                let finder = |sought: &String| Finder::new(sought.as_bytes()).into_owned();
                return Some(Self { sought: flow.sought.iter().map(finder).collect(), compared: flow.compared });
            }
        }
        None
    }

    /// Whether the template cannot tell `content` from any other of which this is true.
    pub(crate) fn inert(&self, content: &str) -> bool {
        let bare = content.trim_matches(is_python_space);
        !bare.is_empty()
            && !self.sought.iter().any(|sought| sought.find(content.as_bytes()).is_some())
            && !self.compared.iter().any(|compared| compared == bare)
    }
}

/// More walks than any template needs whose names settle at all.
const MOST_WALKS: usize = 16;

/// What a value can be, as far as contents are concerned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// The same whatever the contents are.
    Clean,
    /// A list of messages.
    Messages,
    /// A message.
    Message,
    /// A content, its white space perhaps cut. `sure`: and never anything else.
    Content { sure: bool },
    /// Text with contents in it.
    Mixed,
    /// What `split` makes of a content in which the separator is not: a list with the content.
    Parts,
    /// What `namespace` makes.
    Namespace,
}

use Kind::{Clean, Content, Message, Messages, Mixed, Namespace, Parts};

/// An operation whose result is not known.
struct Opaque;

type Known<T> = Result<T, Opaque>;

/// What an expression gives: its kind, and whether it is true where that is known.
#[derive(Clone, Copy)]
struct Given {
    kind: Kind,
    truth: Option<bool>,
}

impl From<Kind> for Given {
    fn from(kind: Kind) -> Self {
        Self { kind, truth: None }
    }
}

const CLEAN: Given = Given { kind: Clean, truth: None };

fn join(a: Kind, b: Kind) -> Known<Kind> {
    Ok(match (a, b) {
        _ if a == b => a,
        (Content { .. }, Content { .. } | Clean) | (Clean, Content { .. }) => Content { sure: false },
        (Mixed, Content { .. } | Clean) | (Content { .. } | Clean, Mixed) => Mixed,
        (Clean, other) | (other, Clean) => other,
        _ => return Err(Opaque),
    })
}

/// Where contents have gone so far.
#[derive(Default)]
struct Flow {
    /// By name; a namespace's attribute stands as `.name`, a macro's result as `macro()`, its parameter as `macro(name)`.
    names: HashMap<String, Kind>,
    /// By macro: the names of its parameters.
    macros: HashMap<String, Vec<String>>,
    /// The macro whose body is walked.
    inside: Option<String>,
    /// What the template, or the innermost macro or block, has shown so far; `None` for nothing.
    shown: Option<Kind>,
    sought: Vec<String>,
    compared: Vec<String>,
    changed: bool,
}

impl Flow {
    fn assign(&mut self, name: String, kind: Kind) -> Known<()> {
        let before = self.names.get(&name).copied();
        let after = before.map_or(Ok(kind), |before| join(before, kind))?;
        if before != Some(after) {
            self.changed = true;
            self.names.insert(name, after);
        }
        Ok(())
    }

    fn show(&mut self, kind: Kind) -> Known<()> {
        self.shown = Some(match (self.shown, kind) {
            (None, kind @ (Clean | Content { .. } | Mixed)) => kind,
            (Some(Clean), Clean) => Clean,
            (Some(_), Clean | Content { .. } | Mixed) => Mixed,
            (_, Messages | Message | Parts | Namespace) => return Err(Opaque),
        });
        Ok(())
    }

    fn statements(&mut self, body: &[Stmt]) -> Known<()> {
        body.iter().try_for_each(|statement| self.statement(statement))
    }

    /// What `body` shows, kept from what stands around it.
    fn captured(&mut self, body: &[Stmt]) -> Known<Option<Kind>> {
        let outer = self.shown.take();
        self.statements(body)?;
        Ok(std::mem::replace(&mut self.shown, outer))
    }

    /// The name under which `name` is kept where the walk is.
    fn key(&self, name: &str) -> String {
        match &self.inside {
            Some(inside) if self.macros[inside].iter().any(|parameter| parameter == name) => {
                format!("{inside}({name})")
            }
            _ => name.to_owned(),
        }
    }

    fn statement(&mut self, statement: &Stmt) -> Known<()> {
        match statement {
            Stmt::Template(template) => self.statements(&template.children),
            Stmt::Continue(_) | Stmt::Break(_) => Ok(()),
            Stmt::EmitRaw(raw) if raw.raw.is_empty() => Ok(()),
            Stmt::EmitRaw(_) => self.show(Clean),
            Stmt::EmitExpr(emitted) => {
                let kind = self.expression(&emitted.expr)?.kind;
                self.show(kind)
            }
            Stmt::Do(called) => self.call(&called.call).map(drop),
            Stmt::Set(set) => {
                let kind = self.expression(&set.expr)?.kind;
                self.bind(&set.target, kind)
            }
            Stmt::SetBlock(block) if block.filter.is_none() => {
                let kind = self.captured(&block.body)?.unwrap_or(Clean);
                self.bind(&block.target, kind)
            }
            Stmt::WithBlock(block) => {
                for (target, value) in &block.assignments {
                    let kind = self.expression(value)?.kind;
                    self.bind(target, kind)?;
                }
                self.statements(&block.body)
            }
            Stmt::IfCond(cond) => {
                let truth = self.expression(&cond.expr)?.truth;
                let before = self.shown;
                if truth != Some(false) {
                    self.statements(&cond.true_body)?;
                }
                if truth != Some(true) {
                    let one = if truth.is_none() { std::mem::replace(&mut self.shown, before) } else { None };
                    self.statements(&cond.false_body)?;
                    self.shown = match (one, self.shown) {
                        (Some(one), Some(other)) => Some(join(one, other)?),
                        (one, other) => one.or(other),
                    };
                }
                Ok(())
            }
            Stmt::ForLoop(repeated) if !repeated.recursive => {
                let item = match self.expression(&repeated.iter)?.kind {
                    Clean => Clean,
                    Messages => Message,
                    Parts => Content { sure: false },
                    Content { .. } | Mixed | Message | Namespace => return Err(Opaque),
                };
                self.bind(&repeated.target, item)?;
                if let Some(filter) = &repeated.filter_expr {
                    self.expression(filter)?;
                }
                if let Some(each) = self.captured(&repeated.body)? {
                    self.show(each)?;
                    self.show(each)?;
                }
                self.statements(&repeated.else_body)
            }
            Stmt::Macro(defined) => {
                let mut parameters = Vec::with_capacity(defined.args.len());
                for parameter in &defined.args {
                    let Expr::Var(name) = parameter else { return Err(Opaque) };
                    parameters.push(name.id.to_owned());
                }
                for default in &defined.defaults {
                    if self.expression(default)?.kind != Clean {
                        return Err(Opaque);
                    }
                }
                if self.inside.is_some() {
                    return Err(Opaque);
                }
                self.changed |= self.macros.insert(defined.name.to_owned(), parameters).is_none();
                self.inside = Some(defined.name.to_owned());
                let kind = self.captured(&defined.body)?.unwrap_or(Clean);
                self.inside = None;
                self.assign(format!("{}()", defined.name), kind)
            }
            _ => Err(Opaque),
        }
    }

    /// Put a value of `kind` into `target`.
    fn bind(&mut self, target: &Expr, kind: Kind) -> Known<()> {
        // A name may be read where nothing was put into it.
        let kind = if let Content { .. } = kind { Content { sure: false } } else { kind };
        match target {
            Expr::Var(name) => self.assign(self.key(name.id), kind),
            Expr::GetAttr(attribute) => self.assign(format!(".{}", attribute.name), kind),
            Expr::List(list) if kind == Clean => list.items.iter().try_for_each(|item| self.bind(item, Clean)),
            Expr::Tuple(tuple) if kind == Clean => tuple.items.iter().try_for_each(|item| self.bind(item, Clean)),
            _ => Err(Opaque),
        }
    }

    fn named(&self, name: &str) -> Known<Kind> {
        let name = self.key(name);
        let kind = self.names.get(&name).copied().unwrap_or(Clean);
        if name == "messages" { join(kind, Messages) } else { Ok(kind) }
    }

    fn expression(&mut self, expression: &Expr) -> Known<Given> {
        match expression {
            Expr::Const(constant) => Ok(Given { kind: Clean, truth: Some(constant.value.is_true()) }),
            Expr::Var(name) if name.id == "loop" => Err(Opaque),
            Expr::Var(name) => Ok(self.named(name.id)?.into()),
            Expr::Slice(slice) => {
                for bound in [&slice.start, &slice.stop, &slice.step].into_iter().flatten() {
                    self.clean(bound)?;
                }
                match self.expression(&slice.expr)?.kind {
                    kind @ (Clean | Messages) => Ok(kind.into()),
                    _ => Err(Opaque),
                }
            }
            Expr::UnaryOp(operation) => {
                let given = self.expression(&operation.expr)?;
                match operation.op {
                    UnaryOpKind::Not => Ok(Given { kind: Clean, truth: given.truth.map(|truth| !truth) }),
                    UnaryOpKind::Neg if given.kind == Clean => Ok(CLEAN),
                    UnaryOpKind::Neg => Err(Opaque),
                }
            }
            Expr::BinOp(operation) => self.binary(operation),
            Expr::Compare(compare) => {
                let mut left = &compare.expr;
                for step in &compare.ops {
                    self.compared(left, step.op, &step.expr)?;
                    left = &step.expr;
                }
                Ok(CLEAN)
            }
            Expr::IfExpr(choice) => {
                let truth = self.expression(&choice.test_expr)?.truth;
                let other = |flow: &mut Self| match &choice.false_expr {
                    Some(expression) => flow.expression(expression),
                    None => Ok(CLEAN),
                };
                match truth {
                    Some(true) => self.expression(&choice.true_expr),
                    Some(false) => other(self),
                    None => {
                        let kind = self.expression(&choice.true_expr)?.kind;
                        Ok(join(kind, other(self)?.kind)?.into())
                    }
                }
            }
            Expr::Filter(filter) => self.filter(filter),
            Expr::Test(test) => self.test(test),
            Expr::GetAttr(attribute) => {
                if let Expr::Var(name) = &attribute.expr
                    && name.id == "loop"
                {
                    let known = ["index", "index0", "first", "last", "length", "revindex", "revindex0", "depth"];
                    return if known.contains(&attribute.name) { Ok(CLEAN) } else { Err(Opaque) };
                }
                let kind = self.expression(&attribute.expr)?.kind;
                Ok(self.attribute(kind, attribute.name).into())
            }
            Expr::GetItem(item) => {
                let kind = self.expression(&item.expr)?.kind;
                if let Some(name) = constant(&item.subscript_expr).as_ref().and_then(Value::as_str) {
                    return Ok(self.attribute(kind, name).into());
                }
                self.clean(&item.subscript_expr)?;
                match kind {
                    Clean => Ok(CLEAN),
                    Messages => Ok(Message.into()),
                    Parts => Ok(Content { sure: false }.into()),
                    Content { .. } | Mixed | Message | Namespace => Err(Opaque),
                }
            }
            Expr::Call(call) => self.call(call),
            Expr::List(list) => self.all_clean(&list.items),
            Expr::Tuple(tuple) => self.all_clean(&tuple.items),
            Expr::Map(map) => {
                self.all_clean(&map.keys)?;
                self.all_clean(&map.values)
            }
        }
    }

    fn clean(&mut self, expression: &Expr) -> Known<()> {
        if self.expression(expression)?.kind == Clean { Ok(()) } else { Err(Opaque) }
    }

    fn all_clean(&mut self, expressions: &[Expr]) -> Known<Given> {
        expressions.iter().try_for_each(|expression| self.clean(expression))?;
        Ok(CLEAN)
    }

    /// A message has a role and a content and nothing else; texts and lists have no attributes.
    fn attribute(&self, kind: Kind, name: &str) -> Kind {
        match (kind, name) {
            (Message, "content") => Content { sure: true },
            (Namespace, name) => self.names.get(&format!(".{name}")).copied().unwrap_or(Clean),
            _ => Clean,
        }
    }

    fn binary(&mut self, operation: &ast::BinOp) -> Known<Given> {
        let comparison = match operation.op {
            BinOpKind::ScAnd | BinOpKind::ScOr => {
                let left = self.expression(&operation.left)?;
                // Where the first operand decides, the second is not looked at.
                let deciding = matches!(operation.op, BinOpKind::ScOr);
                if left.truth == Some(deciding) {
                    return Ok(left);
                }
                let right = self.expression(&operation.right)?;
                if left.truth.is_some() {
                    return Ok(right);
                }
                let truth = right.truth.filter(|&truth| truth == deciding);
                return Ok(Given { kind: join(left.kind, right.kind)?, truth });
            }
            BinOpKind::Add | BinOpKind::Concat => {
                let kinds = [self.expression(&operation.left)?.kind, self.expression(&operation.right)?.kind];
                return match kinds {
                    [Clean, Clean] => Ok(CLEAN),
                    [Clean | Content { .. } | Mixed, Clean | Content { .. } | Mixed] => Ok(Mixed.into()),
                    _ => Err(Opaque),
                };
            }
            BinOpKind::Eq => CompareOpKind::Eq,
            BinOpKind::Ne => CompareOpKind::Ne,
            BinOpKind::Lt => CompareOpKind::Lt,
            BinOpKind::Lte => CompareOpKind::Lte,
            BinOpKind::Gt => CompareOpKind::Gt,
            BinOpKind::Gte => CompareOpKind::Gte,
            BinOpKind::In => CompareOpKind::In,
            BinOpKind::Sub
            | BinOpKind::Mul
            | BinOpKind::Div
            | BinOpKind::FloorDiv
            | BinOpKind::Rem
            | BinOpKind::Pow => {
                self.clean(&operation.left)?;
                self.clean(&operation.right)?;
                return Ok(CLEAN);
            }
        };
        self.compared(&operation.left, comparison, &operation.right)?;
        Ok(CLEAN)
    }

    /// A comparison whose result is the same for all inert contents.
    fn compared(&mut self, left: &Expr, comparison: CompareOpKind, right: &Expr) -> Known<()> {
        let kinds = [self.expression(left)?.kind, self.expression(right)?.kind];
        match (comparison, kinds) {
            (_, [Clean, Clean]) | (CompareOpKind::In | CompareOpKind::NotIn, [Clean, Message]) => Ok(()),
            (CompareOpKind::Eq | CompareOpKind::Ne, [Content { .. }, Clean]) => self.distinguish(right),
            (CompareOpKind::Eq | CompareOpKind::Ne, [Clean, Content { .. }]) => self.distinguish(left),
            (CompareOpKind::In | CompareOpKind::NotIn, [Clean, Content { .. }]) => self.seek(left),
            (CompareOpKind::In | CompareOpKind::NotIn, [Content { .. }, Clean]) => match right {
                Expr::List(list) => list.items.iter().try_for_each(|item| self.distinguish(item)),
                Expr::Tuple(tuple) => tuple.items.iter().try_for_each(|item| self.distinguish(item)),
                _ => Err(Opaque),
            },
            _ => Err(Opaque),
        }
    }

    /// Contents are compared with the constant `expression`.
    fn distinguish(&mut self, expression: &Expr) -> Known<()> {
        let value = constant(expression).ok_or(Opaque)?;
        if let Some(text) = value.as_str() {
            self.compared.push(text.trim_matches(is_python_space).to_owned());
        }
        Ok(())
    }

    /// Contents are searched for the constant `expression`.
    fn seek(&mut self, expression: &Expr) -> Known<()> {
        let value = constant(expression).ok_or(Opaque)?;
        let text = value.as_str().filter(|text| !text.is_empty()).ok_or(Opaque)?;
        if !self.sought.iter().any(|sought| sought == text) {
            self.sought.push(text.to_owned());
        }
        Ok(())
    }

    fn filter(&mut self, filter: &ast::Filter) -> Known<Given> {
        let Some(expression) = &filter.expr else { return Err(Opaque) };
        let given = self.expression(expression)?;
        let arguments: Vec<&Expr> = positional(&filter.args)?;
        match (given.kind, filter.name) {
            (kind, "tojson") => {
                for argument in arguments {
                    self.clean(argument)?;
                }
                // It writes a content as no piece around it would; a probe that gets here shows QUOTED_MARK.
                Ok(if kind == Clean { CLEAN } else { Mixed.into() })
            }
            (kind, "default" | "d") => {
                let mut joined = kind;
                for argument in arguments {
                    joined = join(joined, self.expression(argument)?.kind)?;
                }
                Ok(joined.into())
            }
            (Clean, _) => {
                for argument in arguments {
                    self.clean(argument)?;
                }
                Ok(CLEAN)
            }
            (Content { .. } | Mixed, "trim" | "string") if arguments.is_empty() => Ok(given),
            (Messages, "list" | "reverse") if arguments.is_empty() => Ok(Messages.into()),
            (Messages | Parts, "length" | "count") if arguments.is_empty() => Ok(CLEAN),
            (Messages, "first" | "last") if arguments.is_empty() => Ok(Message.into()),
            (Parts, "first" | "last") if arguments.is_empty() => Ok(Content { sure: false }.into()),
            (Messages, "selectattr" | "rejectattr") => {
                let by_role =
                    arguments.first().and_then(|first| constant(first)).is_some_and(|key| key.as_str() == Some("role"));
                for argument in arguments {
                    self.clean(argument)?;
                }
                if by_role { Ok(Messages.into()) } else { Err(Opaque) }
            }
            _ => Err(Opaque),
        }
    }

    fn test(&mut self, test: &ast::Test) -> Known<Given> {
        let given = self.expression(&test.expr)?;
        let arguments = positional(&test.args)?;
        let of_type = matches!(
            test.name,
            "defined" | "undefined" | "none" | "string" | "mapping" | "sequence" | "iterable" | "number" | "boolean"
        );
        if of_type && arguments.is_empty() {
            let truth = match (given.kind, test.name) {
                (Content { sure: true }, "defined" | "string") => Some(true),
                (Content { sure: true }, "undefined" | "none" | "mapping" | "sequence" | "number" | "boolean") => {
                    Some(false)
                }
                _ => None,
            };
            return Ok(Given { kind: Clean, truth });
        }
        for argument in arguments {
            self.clean(argument)?;
        }
        if given.kind == Clean { Ok(CLEAN) } else { Err(Opaque) }
    }

    fn call(&mut self, call: &ast::Call) -> Known<Given> {
        match &call.expr {
            Expr::Var(function) => self.function(function.id, &call.args),
            Expr::GetAttr(method) => {
                let given = self.expression(&method.expr)?;
                self.method(given, method.name, &call.args)
            }
            _ => Err(Opaque),
        }
    }

    fn function(&mut self, name: &str, arguments: &[CallArg]) -> Known<Given> {
        if let Some(parameters) = self.macros.get(name).cloned() {
            let mut given = vec![CLEAN; parameters.len()];
            for (at, argument) in arguments.iter().enumerate() {
                let (at, value) = match argument {
                    CallArg::Pos(value) => (Some(at), value),
                    CallArg::Kwarg(named, value) => (parameters.iter().position(|parameter| parameter == named), value),
                    CallArg::PosSplat(_) | CallArg::KwargSplat(_) => return Err(Opaque),
                };
                let slot = at.and_then(|at| given.get_mut(at)).ok_or(Opaque)?;
                *slot = self.expression(value)?;
            }
            for (parameter, given) in parameters.iter().zip(given) {
                self.assign(format!("{name}({parameter})"), given.kind)?;
            }
            return Ok(self.names.get(&format!("{name}()")).copied().unwrap_or(Clean).into());
        }
        if name == "namespace" {
            for argument in arguments {
                let CallArg::Kwarg(attribute, value) = argument else { return Err(Opaque) };
                let kind = self.expression(value)?.kind;
                let kind = if let Content { .. } = kind { Content { sure: false } } else { kind };
                self.assign(format!(".{attribute}"), kind)?;
            }
            return Ok(Namespace.into());
        }
        // Whatever is raised, nothing is shown.
        let raises = name == "raise_exception";
        for argument in positional(arguments)? {
            let kind = self.expression(argument)?.kind;
            if kind != Clean && !raises {
                return Err(Opaque);
            }
        }
        Ok(CLEAN)
    }

    fn method(&mut self, given: Given, name: &str, arguments: &[CallArg]) -> Known<Given> {
        let arguments = positional(arguments)?;
        match (given.kind, name, &arguments[..]) {
            (Clean, _, _) => {
                for argument in arguments {
                    self.clean(argument)?;
                }
                Ok(CLEAN)
            }
            (Message, "get", [key, rest @ ..]) => {
                let key = constant(key).ok_or(Opaque)?;
                let mut kind = self.attribute(Message, key.as_str().ok_or(Opaque)?);
                for default in rest {
                    kind = join(kind, self.expression(default)?.kind)?;
                }
                Ok(kind.into())
            }
            (Content { .. } | Mixed, "strip" | "lstrip" | "rstrip", []) => Ok(given),
            (Content { .. } | Mixed, "strip" | "lstrip" | "rstrip", [characters]) => {
                // With all white space and with line ends alone, one cut of each side is known from a probe.
                match constant(characters).as_ref().and_then(Value::as_str) {
                    Some("\n") => Ok(given),
                    _ => Err(Opaque),
                }
            }
            (Content { .. }, "startswith" | "endswith", [sought]) => self.seek(sought).map(|()| CLEAN),
            (Content { .. }, "split", [separator, most @ ..]) => {
                for most in most {
                    self.clean(most)?;
                }
                self.seek(separator).map(|()| Parts.into())
            }
            (Content { .. }, "replace", [sought, other]) => {
                self.clean(other)?;
                self.seek(sought).map(|()| given)
            }
            _ => Err(Opaque),
        }
    }
}

fn constant(expression: &Expr) -> Option<Value> {
    match expression {
        Expr::Const(constant) => Some(constant.value.clone()),
        _ => None,
    }
}

/// The values of plain and named arguments.
fn positional<'a>(arguments: &'a [CallArg<'a>]) -> Known<Vec<&'a Expr<'a>>> {
    arguments
        .iter()
        .map(|argument| match argument {
            CallArg::Pos(value) | CallArg::Kwarg(_, value) => Ok(value),
            CallArg::PosSplat(_) | CallArg::KwargSplat(_) => Err(Opaque),
        })
        .collect()
}
