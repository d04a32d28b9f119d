// Package imports finds what a file loads when it is loaded itself: the modules that a
// Python source imports, the libraries that an ELF file needs.
//
// It reads sources as text and knows no more of the language than where its
// statements begin and what runs when a module is loaded: what stands in a
// function does not, nor what is only for type checkers or for when another
// import failed. It may be wrong. What it finds says what is worth fetching
// early, never what a program sees.
package imports

import "bytes"

// Import is one import of a module (The Python Language Reference, section 7.11).
type Import struct {
	Level  int      // 0 for an absolute name; 1 begins in the package of the source, every other one package above
	Module string   // dotted; empty if the package itself is meant
	Names  []string // what is taken from it: modules below it, among other things
}

// Bounds on what is found in one source. More is left out.
const (
	MaxImports = 4 << 10
	MaxNames   = 1 << 10 // of one import
	MaxLevel   = 64
	MaxModule  = 255     // bytes, as of every name
	maxHead    = 1 << 10 // bytes of a line before its keyword
)

// Scanner reads sources. The zero value is ready.
type Scanner struct {
	known map[string]string // one string for each that occurs
	buf   []string          // of names
}

// Scan returns what the source src imports, in the order in which it does. It takes
// time in proportion to the length of src.
func (z *Scanner) Scan(src []byte) (found []Import) {
	if z.known == nil {
		z.known = map[string]string{}
	}
	s := scan{Scanner: z, src: src, work: walkPerByte * len(src)}
	line, before := 0, 0 // where it begins, and the keyword before
	for at := 0; at < len(src) && len(found) < MaxImports; {
		i := bytes.Index(src[at:], keyword[1:]) // m is rarer than i
		if i < 0 {
			break
		}
		i += at - 1
		if i < at || src[i] != keyword[0] {
			at = i + len(keyword)
			continue
		}
		if nl := bytes.LastIndexByte(src[before:i], '\n'); nl >= 0 {
			line = before + nl + 1
		}
		at, before = i+len(keyword), i
		if len(src) == at || !gap(src[at]) || i-line > maxHead {
			continue
		}
		all, end := s.statement(found, line, i)
		at = max(at, end) // no byte is part of two statements
		if len(all) > len(found) {
			found, src = all, s.src[:min(len(s.src), at+together)]
		}
	}
	return found[:min(len(found), MaxImports)]
}

var keyword = []byte("import")

// together is how far apart the imports of a source are at most, in bytes: what comes
// so far behind one is other code, and not worth a search.
const together = 8 << 10

// walkPerByte bounds how often a byte is looked at in search of the block that a
// statement is in.
const walkPerByte = 4

// maxKnown bounds the strings that are kept though no import may have them.
const maxKnown = 1 << 15

// string returns b as one of the strings that are known.
func (z *Scanner) string(b []byte) string {
	known, ok := z.known[string(b)]
	if !ok {
		if len(z.known) == maxKnown {
			clear(z.known)
		}
		known = string(b)
		z.known[known] = known
	}
	return known
}

// scan is a source that is read.
type scan struct {
	*Scanner
	src  []byte
	work int // bytes that may still be looked at for the blocks of statements
}

// statement appends what the statement with the keyword import at i imports, in a
// line that begins at line, and returns where it ends, if it is one.
func (s *scan) statement(found []Import, line, i int) (_ []Import, end int) {
	head := s.src[line+indentation(s.src[line:i]) : i]
	var x Import
	var module []byte
	isFrom := len(head) > 0
	if isFrom {
		from, ok := bytes.CutPrefix(head, []byte("from"))
		if !ok || len(from) == 0 || !gap(from[0]) && from[0] != '.' {
			return found, 0
		}
		from = bytes.Trim(from, " \t")
		module = bytes.TrimLeft(from, ".")
		x.Level = len(from) - len(module)
		module = module[indentation(module):]
		if len(module) > MaxModule || x.Level > MaxLevel || x.Level == 0 && len(module) == 0 || identifier(module) < len(module) {
			return found, 0
		}
	}
	if !s.runs(line) {
		return found, 0
	}
	p := parser{Scanner: s.Scanner, rest: s.src[i+len(keyword):]}
	names := p.names()
	end = len(s.src) - len(p.rest)
	if isFrom {
		x.Module, x.Names = s.string(module), append(x.Names, names...)
		return append(found, x), end
	}
	for _, name := range names {
		found = append(found, Import{Module: name})
	}
	return found, end
}

// runs says whether a line that begins at line runs when the module is loaded: it
// follows the headers of the blocks that the line is in.
func (s *scan) runs(line int) bool {
	indent := indentation(s.src[line:])
	for indent > 0 && line > 0 {
		end := line - 1
		line = bytes.LastIndexByte(s.src[:end], '\n') + 1
		if s.work -= end - line + 1; s.work < 0 {
			return false
		}
		text := s.src[line:end]
		n := indentation(text)
		if text = text[n:]; len(bytes.TrimSpace(text)) == 0 || text[0] == '#' || n >= indent {
			continue
		}
		if !entered(text) {
			return false
		}
		indent = n
	}
	return true
}

// entered says whether the block behind a header runs when the module is loaded.
func entered(header []byte) bool {
	word := header[:identifier(header)]
	switch string(word) {
	case "if", "elif":
		return !bytes.Contains(header, []byte("TYPE_CHECKING")) && !bytes.Contains(header, []byte("__main__"))
	case "try", "else", "with", "class", "for", "while", "finally":
		return true
	}
	return false
}

func indentation(line []byte) (n int) {
	for n < len(line) && (line[n] == ' ' || line[n] == '\t') {
		n++
	}
	return n
}

func gap(c byte) bool { return c == ' ' || c == '\t' || c == '(' || c == '\\' }

// identifier returns how many bytes of a dotted name b begins with.
func identifier(b []byte) (n int) {
	for n < len(b) && inName[b[n]] {
		n++
	}
	return n
}

var inName = func() (in [256]bool) {
	for c := range in {
		in[c] = c == '.' || c == '_' || '0' <= c && c <= '9' || 'A' <= c && c <= 'Z' || 'a' <= c && c <= 'z' || c >= 0x80
	}
	return in
}()

// parser reads a list of names.
type parser struct {
	*Scanner
	rest  []byte
	inner bool // in parentheses
}

// names reads names, each with or without another one that it gets, up to what is
// none. They are valid until it is called again.
func (p *parser) names() []string {
	names := p.buf[:0]
	p.space()
	if p.inner = len(p.rest) > 0 && p.rest[0] == '('; p.inner {
		p.rest = p.rest[1:]
	}
	for len(names) < MaxNames {
		name := p.word()
		if name == "" {
			break
		}
		names = append(names, name)
		p.space()
		if bytes.HasPrefix(p.rest, []byte("as")) && identifier(p.rest[:min(len(p.rest), 3)]) == 2 {
			p.rest = p.rest[2:]
			p.word()
			p.space()
		}
		if len(p.rest) == 0 || p.rest[0] != ',' {
			break
		}
		p.rest = p.rest[1:]
	}
	p.buf = names
	return names
}

func (p *parser) word() string {
	p.space()
	n := identifier(p.rest)
	if n > MaxModule {
		n = 0
	}
	word := p.rest[:n]
	p.rest = p.rest[n:]
	return p.string(word)
}

// space skips what may stand between two names.
func (p *parser) space() {
	for len(p.rest) > 0 {
		n := 1
		switch c := p.rest[0]; {
		case c == ' ', c == '\t', c == '\r', c == '\n' && p.inner:
		case c == '#' && p.inner:
			if n = bytes.IndexByte(p.rest, '\n'); n < 0 {
				n = len(p.rest)
			}
		case bytes.HasPrefix(p.rest, []byte("\\\n")):
			n = 2
		case bytes.HasPrefix(p.rest, []byte("\\\r\n")):
			n = 3
		default:
			return
		}
		p.rest = p.rest[n:]
	}
}
