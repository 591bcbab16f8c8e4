// Facts in one line, which breaks between them alone.
export const inOneLine = (facts) => facts.map((fact) => fact.replaceAll(" ", "\u00a0")).join(" · ");
